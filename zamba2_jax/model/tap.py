"""Named taps: seeing, and changing, what flows inside a model.

A tap is a function `(name, value) -> value` that the model calls at every named place and whose result it goes on
with. Names are paths: `embed`, `layers.3.input`, `layers.3.shared.attention.q`, `layers.3.mamba.ssm_state`,
`layers.3.output`, `final_norm`, `logits`; `tap_names` lists them.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax

from zamba2_jax.typing import Array

if TYPE_CHECKING:
    from zamba2_jax.model.zamba2 import Zamba2

Tap = Callable[[str, Array], Array]


def no_tap(name: str, value: Array) -> Array:
    """The tap that does nothing."""
    del name
    return value


def scoped(tap: Tap, scope: str) -> Tap:
    """`tap`, with `scope.` before every name."""
    return tap if tap is no_tap else lambda name, value: tap(f"{scope}.{name}", value)


def capture(
    model: "Zamba2",
    tokens: Array | None = None,
    *,
    select: Iterable[str] = ("*",),
    edits: Mapping[str, Callable[[Array], Array]] | None = None,
    **kwargs: Any,
) -> tuple[Array, dict[str, Array]]:
    """Runs the model and returns its logits and the values at the selected taps.

    A pure function, so it can be compiled: `jax.jit(partial(capture, select=("*.attention.q",)))(model, tokens)` gives
    the queries of every call of a shared block.

    Args:
        model: the model.
        tokens, **kwargs: as in `Zamba2.__call__`.
        select: shell-style patterns of tap names. `*` matches dots too, so that "layers.*.output" has the outputs of
            layers, mixers and shared blocks; those of layers alone are ("layers.?.output", "layers.??.output").
        edits: for a tap name or pattern, a function whose result takes the value's place, as for an ablation:
            `{"layers.5.shared.output": jnp.zeros_like}`. Captured values are those after the edit.

    Raises:
        ValueError: a pattern of `select` or `edits` matches no tap.
    """
    select, edits = tuple(select), dict(edits or {})
    unmatched = {*select, *edits}
    captured: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        for pattern, edit in edits.items():
            if fnmatchcase(name, pattern):
                unmatched.discard(pattern)
                value = edit(value)
        for pattern in select:
            if fnmatchcase(name, pattern):
                unmatched.discard(pattern)
                captured[name] = value
        return value

    logits = model(tokens, tap=tap, **kwargs)
    if unmatched:
        raise ValueError(f"no tap matches {sorted(unmatched)}; tap_names(model) lists them")
    return logits, captured


def tap_names(model: "Zamba2") -> dict[str, jax.ShapeDtypeStruct]:
    """Every tap of the model, with shape and dtype for one row of one token. Computes nothing."""
    token = jax.ShapeDtypeStruct((1, 1), "int32")
    return jax.eval_shape(lambda model, token: capture(model, token)[1], model, token)
