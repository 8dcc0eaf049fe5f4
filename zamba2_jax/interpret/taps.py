"""Seeing, and changing, the named values inside a model; see `nn.tap` for what names there are."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.nn.cache import Cache
from zamba2_jax.nn.tap import Edit, Tap
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.typing import Array


class Captured(NamedTuple):
    """What `capture` saw.

    Attributes:
        logits: of the model.
        values: at the selected taps, by name.
        cache: after the tokens, where one was given.
    """

    logits: Array
    values: dict[str, Array]
    cache: Cache | None


def capture(
    model: LanguageModel,
    tokens: Array | None = None,
    *,
    select: Iterable[str] = ("*",),
    edits: Mapping[str, Callable[[Array], Array]] | None = None,
    cache: Cache | None = None,
    backend: Backend | None = None,
    **kwargs: Any,
) -> Captured:
    """Runs the model and returns its logits and the values at the selected taps.

    A pure function, so it can be compiled: `jax.jit(partial(capture, select=("*.attention.q",)))(model, tokens)` gives
    the queries of every call of a shared block.

    Args:
        model: the model.
        tokens, **kwargs: as in `LanguageModel.run`; with a cache also one token per row, [b], for a step.
        select: shell-style patterns of tap names. `*` matches dots too, so that "layers.*.output" has the outputs of
            layers, mixers and shared blocks; those of layers alone are ("layers.?.output", "layers.??.output").
        edits: for a tap name or pattern, a function whose result takes the value's place, as for an ablation:
            `{"layers.5.shared.output": jnp.zeros_like}`. Captured values are those after the edit.
        cache: where the rows stand.
        backend: how ops are computed; `default_backend` by default.

    Raises:
        ValueError: a pattern of `select` or `edits` matches no tap.
    """
    select, backend = tuple(select), default_backend(model.dtype) if backend is None else backend
    unmatched = {*select, *(edits or {})}

    def selected(name: str) -> bool:
        matching = [pattern for pattern in select if fnmatchcase(name, pattern)]
        unmatched.difference_update(matching)
        return bool(matching)

    tap = Tap(_editing(edits or {}, unmatched), selected)
    is_step = cache is not None and tokens is not None and tokens.ndim == 1
    tokens = tokens[:, None] if is_step and tokens is not None else tokens
    run = model.run(tokens, cache=cache, is_step=is_step, tap=tap, backend=backend, **kwargs)
    at_end = tap.fresh()
    logits = at_end("logits", model.logits(run.h[:, 0] if is_step else run.h, backend=backend))
    if unmatched:
        raise ValueError(f"no tap matches {sorted(unmatched)}; tap_names(model) lists them")
    return Captured(logits, run.tapped | at_end.values, run.cache)


def edits_tap(model: LanguageModel, edits: Mapping[str, Callable[[Array], Array]]) -> Tap:
    """The tap that makes edits, by tap name or pattern as in `capture`, wherever a tap is taken.

    Make it once: a compiled function is compiled anew for another one.

    Raises:
        ValueError: a pattern matches no tap of the model.
    """
    functions, names = dict(edits), tap_names(model)
    unmatched = sorted(pattern for pattern in functions if not any(fnmatchcase(name, pattern) for name in names))
    if unmatched:
        raise ValueError(f"no tap matches {unmatched}; tap_names(model) lists them")
    return Tap(_editing(functions, set()))


def _editing(edits: Mapping[str, Callable[[Array], Array]], unmatched: set[str]) -> Edit:
    """The edits as one function; patterns that match are taken out of `unmatched`."""

    def edit(name: str, value: Array) -> Array:
        for pattern, function in edits.items():
            if fnmatchcase(name, pattern):
                unmatched.discard(pattern)
                value = function(value)
        return value

    return edit


def tap_names(model: LanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Every tap of the model, with shape and dtype for one row of one token. Computes nothing."""
    token = jax.ShapeDtypeStruct((1, 1), "int32")
    return jax.eval_shape(lambda model, token: capture(model, token).values, model, token)
