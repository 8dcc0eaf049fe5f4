"""Whole calls: prompts in, continuations out."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

from zamba2_jax.inference.decode import check_tokens
from zamba2_jax.inference.engine import Completion, Engine, Event, Request
from zamba2_jax.inference.sampling import GREEDY, Sampling
from zamba2_jax.interpret.taps import edits_tap
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.nn.tap import NO_TAP
from zamba2_jax.ops.backend import Backend
from zamba2_jax.text.stream import TokenizerLike, token_lists
from zamba2_jax.typing import Array

Edits = Mapping[str, Callable[[Array], Array]]
Prompt = TypeVar("Prompt", str, Sequence[int])


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    *,
    tokenizer: TokenizerLike | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    prefix: Sequence[int] = (),
    slots: int = 8,
    edits: Edits | None = None,
    backend: Backend | None = None,
) -> list[Prompt]:
    """Continues every prompt: strings by strings, lists of token ids by lists of token ids.

    Args:
        model: the model.
        prompts: token ids; or strings, with a tokenizer.
        max_new_tokens: most tokens to add to each.
        sampling: how tokens are chosen; greedy by default. One for each prompt; or one for all, and then prompt i has
            the seed `sampling.seed + i`, so that a prompt given twice is continued in two ways.
        tokenizer: for strings. What it adds to a text by itself, it adds.
        stop_tokens: a continuation ends with the first of these, which a list includes and a string does not.
        stop_strings: a continuation ends with the token that completes the first of these; a string ends before it.
        prefix: token ids before every prompt, taken in once.
        slots: most prompts that run at a time.
        edits: changes what flows inside, by tap name or pattern; see `interpret.taps.capture`.
        backend: how ops are computed; `default_backend` by default.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        ValueError: before anything is computed: there are no prompts, one is empty or holds an id outside the
            vocabulary, strings come without a tokenizer, a parameter is out of its range, or an edit matches no tap.
    """
    engine = _engine_with(
        model, prompts, max_new_tokens, sampling, tokenizer, stop_tokens, stop_strings, prefix, slots, edits, backend
    )
    done = {event.request: event for event in engine.events(streaming=False) if isinstance(event, Completion)}
    in_order = [done[i] for i in range(len(prompts))]
    strings = isinstance(prompts[0], str)
    return cast(list[Prompt], [each.text if strings else list(each.tokens) for each in in_order])


def stream(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    *,
    tokenizer: TokenizerLike | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    prefix: Sequence[int] = (),
    slots: int = 8,
    edits: Edits | None = None,
    backend: Backend | None = None,
) -> Iterator[Event]:
    """As `generate`, token by token: a `Token` for each, and a `Completion` after a prompt's last.

    On CPU a token is given as it comes, on an accelerator with up to `engine.STREAMED` others.

    `event.request` is the index of the prompt. With a tokenizer each token carries the text it adds.

    Raises:
        ValueError: as in `generate`, by this call already.
    """
    return _engine_with(
        model, prompts, max_new_tokens, sampling, tokenizer, stop_tokens, stop_strings, prefix, slots, edits, backend
    ).events()


def _engine_with(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    tokenizer: TokenizerLike | None,
    stop_tokens: Sequence[int],
    stop_strings: Sequence[str],
    prefix: Sequence[int],
    slots: int,
    edits: Edits | None,
    backend: Backend | None,
) -> Engine:
    """An engine as large as the prompts need, and they in its queue."""
    if not len(prompts):
        raise ValueError("prompts is empty: expected at least one")
    vocab_size = model.config.vocab_size
    rows = [check_tokens(row, vocab_size, f"prompt {i}") for i, row in enumerate(token_lists(prompts, tokenizer))]
    if isinstance(sampling, Sampling):
        sampling = [sampling.for_prompt(i) for i in range(len(rows))]
    if len(sampling) != len(rows):
        raise ValueError(f"sampling has {len(sampling)} entries: expected one, or {len(rows)}, as prompts")
    requests = [
        Request(row.tolist(), max_new_tokens, how, stop_tokens, stop_strings)
        for row, how in zip(rows, sampling, strict=True)
    ]
    before = len(check_tokens(prefix, vocab_size, "prefix")) if len(prefix) else 0
    tap = edits_tap(model, edits) if edits else NO_TAP
    engine = Engine.for_requests(
        model, requests, slots=slots, before=before, tokenizer=tokenizer, tap=tap, backend=backend
    )
    for request in requests:
        engine.check(request)
    taken = engine.prefix(prefix) if before else None
    for request in requests:
        engine.submit(dataclasses.replace(request, prefix=taken))
    return engine
