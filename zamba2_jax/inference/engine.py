"""Many requests through a fixed number of slots.

A slot is a row of one batch. A prompt is taken in alone, in pieces of few lengths padded at the end, and its cache is
then written into a free slot; all slots take their next tokens in one compiled step. So a request sees nothing of its
neighbours: in one engine its tokens are the same whoever they are, and between engines of unlike shapes they differ at
most where two tokens are equally likely up to rounding.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zamba2_jax.inference.decode import (
    APART,
    check_tokens,
    next_power_of_two,
    padded_length,
    prefill_donated,
    rounded_capacity,
)
from zamba2_jax.inference.sampling import GREEDY, Sampling, SamplingRows, is_int, log_probability, sample
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.cache import init_cache
from zamba2_jax.nn.cache import Cache, placed
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.tap import NO_TAP, Tap
from zamba2_jax.ops.backend import Backend, default_backend
from zamba2_jax.ops.placement import platform
from zamba2_jax.parallel.mesh import constrain
from zamba2_jax.parallel.sharded_ops import row_axes
from zamba2_jax.text.stream import TextStream, TokenizerLike, byte_tokens, hidden_tokens
from zamba2_jax.typing import Array, DTypeLike, at_least_fp32

BLOCK = 32
"""Most tokens per slot between two visits to the host."""
STREAMED = 8
"""The same while streaming to an accelerator's host: a visit takes it longer than a step takes the device."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A beginning that many prompts share, taken in once; see `Engine.prefix`.

    Attributes:
        tokens: of the prefix, [t], int32.
        cache: one row, after them.
    """

    tokens: np.ndarray
    cache: Cache


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids; after a prefix, those that follow it. At least one.
        max_new_tokens: most tokens to add.
        sampling: how they are chosen.
        stop_tokens: the continuation ends with the first of these, which is its last token and not in its text.
        stop_strings: the continuation ends with the token that completes the first of these; its text ends before it.
        prefix: what stands before the prompt.

    Raises:
        ValueError: `max_new_tokens` is below 1, or a stop is not of its type.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_new_tokens, 1):
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r}: expected an integer, at least 1")
        strings = isinstance(self.stop_strings, Sequence) and not isinstance(self.stop_strings, str)
        if not strings or not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"stop_strings={self.stop_strings!r}: expected a sequence of strings, none empty")
        if isinstance(self.stop_tokens, str) or not isinstance(self.stop_tokens, Sequence | np.ndarray):
            raise ValueError(f"stop_tokens={self.stop_tokens!r}: expected a sequence of token ids")


@dataclasses.dataclass(frozen=True)
class Token:
    """One more token of a request.

    Attributes:
        request: its number.
        token: the id.
        logprob: its natural log-probability under the model, before penalty, temperature and cuts.
        text: what is certain of the text with this token and was not before; "" without a tokenizer.
    """

    request: int
    token: int
    logprob: float
    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request that is done.

    Attributes:
        request: its number.
        tokens: all that were added.
        logprobs: of each, as in `Token`.
        text: of the tokens; "" without a tokenizer.
        finish: "stop", at a stop token or string; or "length", at `max_new_tokens`.
    """

    request: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]


Event = Token | Completion


@dataclasses.dataclass
class _Task:
    """A request on its way."""

    number: int
    request: Request
    text: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    def add(self, token: int, logprob: float) -> Token:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        piece = "" if self.text is None or token in self.request.stop_tokens else self.text.add(token)
        if self.text is not None and self.finish is not None:
            piece += self.text.end()
        return Token(self.number, token, logprob, piece)

    @property
    def finish(self) -> Literal["stop", "length"] | None:
        """Why it is done; None while it is not."""
        if self.tokens[-1] in self.request.stop_tokens or (self.text is not None and self.text.stopped):
            return "stop"
        return "length" if len(self.tokens) == self.request.max_new_tokens else None


class Engine:
    """Continues requests, `slots` of them at a time.

    Attributes:
        slots: rows of the batch.
        capacity: most tokens of one request, prefix, prompt and continuation together.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 8,
        capacity: int | None = None,
        chunk: int | None = None,
        tokenizer: TokenizerLike | None = None,
        tap: Tap = NO_TAP,
        backend: Backend | None = None,
    ):
        """An engine without requests. Its caches are allocated here: `cache_bytes(config, slots, capacity, dtype)`.

        Several slots take as much again as one of them, for the row that prompts are taken in by; one slot is that row.

        Args:
            model: the model.
            slots: requests that run at a time.
            capacity: tokens per slot; `config.max_position_embeddings` by default.
            chunk: most tokens of a prompt taken in at a time: memory for activations grows with it, not with prompts.
                By default 512 on CPU and 2,048 elsewhere, where a piece takes long to start.
            tokenizer: for text and stop strings.
            tap: its edits change what flows inside; see `interpret.taps.edits_tap`.
            backend: how ops are computed; `default_backend` by default.

        Raises:
            ValueError: slots, capacity or chunk is below 1, or the tap selects values.
        """
        capacity = model.config.max_position_embeddings if capacity is None else capacity
        chunk = (512 if platform() == "cpu" else 2048) if chunk is None else chunk
        for name, count in {"slots": slots, "capacity": capacity, "chunk": chunk}.items():
            if not is_int(count, 1):
                raise ValueError(f"{name}={count!r}: expected an integer, at least 1")
        self.slots, self.capacity = slots, capacity
        self._model, self._chunk, self._tokenizer = model, chunk, tokenizer
        self._tap, self._backend = tap.edits(), default_backend(model.dtype) if backend is None else backend
        self._hidden, self._bytes = hidden_tokens(tokenizer), byte_tokens(tokenizer)
        self._rows = _empty_rows(model.config, slots, capacity, model.dtype)
        self._row: Cache | None = None
        # docs/xla-notes.md: weights-carried-by-loops
        self._loop = not (model.dtype == jnp.bfloat16 and platform() == "cpu")
        self._streamed = 1 if platform() == "cpu" else STREAMED
        self._tasks: list[_Task | None] = [None] * slots
        self._queue: deque[_Task] = deque()
        self._events: deque[Event] = deque()
        self._numbers = itertools.count()

    @classmethod
    def for_requests(
        cls,
        model: LanguageModel,
        requests: Sequence[Request],
        *,
        slots: int,
        before: int = 0,
        capacity: int | None = None,
        tokenizer: TokenizerLike | None = None,
        tap: Tap = NO_TAP,
        backend: Backend | None = None,
    ) -> "Engine":
        """An engine as large as some requests need, which are still to be submitted.

        Args:
            model: the model.
            requests: at least one.
            slots: most requests that run at a time; fewer slots are made for few requests.
            before: tokens of the prefix that they are still to get.
            capacity: tokens per slot; as many as the longest request needs by default.
            tokenizer, tap, backend: as for an engine.
        """
        longest = before + max(len(request.prompt) + request.max_new_tokens for request in requests)
        return cls(
            model,
            slots=min(slots, next_power_of_two(len(requests))),
            capacity=rounded_capacity(longest) if capacity is None else capacity,
            tokenizer=tokenizer,
            tap=tap,
            backend=backend,
        )

    def submit(self, request: Request) -> int:
        """Queues a request, also while `events` is being read, and gives its number, counted from 0.

        Raises:
            ValueError: as in `check`.
        """
        self.check(request)
        before = request.prompt if request.prefix is None else [*request.prefix.tokens, *request.prompt]
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer.decode, request.stop_strings, before, self._hidden, self._bytes)
        task = _Task(next(self._numbers), request, text)
        self._queue.append(task)
        return task.number

    def check(self, request: Request) -> None:
        """Whether this engine can take the request.

        Raises:
            ValueError: the prompt is empty, a token is outside the vocabulary, the tokens do not fit in the capacity,
                there are stop strings and no tokenizer, or the prefix is for another capacity.
        """
        vocab_size, before = self._model.config.vocab_size, 0
        prompt = check_tokens(request.prompt, vocab_size, "prompt")
        if len(request.stop_tokens):
            check_tokens(request.stop_tokens, vocab_size, "stop_tokens")
        if request.stop_strings and self._tokenizer is None:
            raise ValueError(f"stop_strings={request.stop_strings!r}: expected an engine with a tokenizer")
        if request.prefix is not None:
            before = len(request.prefix.tokens)
            self._check_prefix(request.prefix)
        self._check_fits(before + len(prompt), request.max_new_tokens)

    def cancel(self, number: int) -> bool:
        """Drops a request, its events that have not been read too, and frees its slot.

        Returns:
            Whether there was anything to drop.
        """
        kept = deque(task for task in self._queue if task.number != number)
        unread = deque(event for event in self._events if event.request != number)
        slots = [slot for slot, task in enumerate(self._tasks) if task is not None and task.number == number]
        dropped = len(kept) < len(self._queue) or len(unread) < len(self._events) or bool(slots)
        self._queue, self._events = kept, unread
        for slot in slots:
            self._rows, self._tasks[slot] = _end(self._rows, slot), None
        return dropped

    def prefix(self, tokens: Sequence[int], after: Prefix | None = None) -> Prefix:
        """Takes in what many prompts begin with, once. It holds a cache row of the full capacity.

        Args:
            tokens: of the prefix.
            after: a prefix that these tokens go on from.

        Raises:
            ValueError: there are no tokens, one is outside the vocabulary, they do not fit in the capacity, or `after`
                is for another capacity.
        """
        new = check_tokens(tokens, self._model.config.vocab_size, "prefix")
        if after is not None:
            self._check_prefix(after)
        whole = new if after is None else np.concatenate([after.tokens, new])
        self._check_fits(len(whole), 0)
        return Prefix(whole, self._take_in(new, after, None)[1])

    def events(self, *, streaming: bool = True) -> Iterator[Event]:
        """Works until every request is done, and gives what happens: each token, and each completion after its last.

        Reading may be broken off and taken up again with another call: no event is lost. But an exception in the middle
        of a step, such as a KeyboardInterrupt, takes the caches with it, which the step was given to overwrite.

        Args:
            streaming: whether tokens are given as soon as they are there, or on an accelerator every few steps; else up
                to `BLOCK` steps are run before the host looks at them (not in bfloat16 on CPU, where one is).

        Raises:
            RuntimeError: an exception has broken off a step before.
        """
        if self._rows.token.is_deleted():
            raise RuntimeError("a step of this engine was broken off, and its caches are lost: expected a new engine")
        while self._events or self._queue or any(self._tasks):
            if self._events:
                yield self._events.popleft()
            elif self._queue and None in self._tasks:
                self._start(self._queue.popleft(), self._tasks.index(None))
            else:
                self._decode(self._streamed if streaming else BLOCK)

    def _start(self, task: _Task, slot: int) -> None:
        """Takes a prompt in and chooses its first token."""
        request, vocab_size = task.request, self._model.config.vocab_size
        prompt = np.asarray(request.prompt)
        logits, row = self._take_in(prompt, request.prefix, self._row_memory())
        whole = prompt if request.prefix is None else np.concatenate([request.prefix.tokens, prompt])
        stops, seen = _mask(request.stop_tokens, vocab_size), _mask(whole, vocab_size)
        how = SamplingRows.stack([request.sampling])
        if self.slots == 1:
            self._rows = dataclasses.replace(self._rows, cache=row)
        else:
            self._row = row
        self._rows, *first = _insert(self._rows, slot, self._row, logits, request.max_new_tokens, stops, seen, how)
        self._tasks[slot] = task
        token, logprob = jax.device_get(first)
        self._record(slot, [token.item()], [logprob.item()])

    def _row_memory(self) -> Cache | None:
        """A row whose content nobody needs, to take a prompt in; none yet, or none any more after an exception."""
        row = self._rows.cache if self.slots == 1 else self._row
        return None if row is None or row.lengths.is_deleted() else row

    def _take_in(self, tokens: np.ndarray, prefix: Prefix | None, memory: Cache | None) -> tuple[Array, Cache]:
        """Logits [1, v] after the tokens, and the cache of one row with them, which takes the place of `memory`."""
        if prefix is None:
            cache = _empty_row(self._model.config, self.capacity, self._model.dtype, memory)
        else:
            cache = _copy(prefix.cache, memory)
        for start in range(0, len(tokens), self._chunk):
            piece = tokens[start : start + self._chunk]
            padded = np.zeros((1, padded_length(len(piece), self._chunk)), np.int32)
            padded[0, : len(piece)] = piece
            real = np.array([len(piece)], np.int32)
            how = {"tap": self._tap, "backend": self._backend}
            logits, cache = prefill_donated(self._model, padded, real, cache, **how)
        return logits, cache

    def _decode(self, steps: int) -> None:
        """Up to `steps` tokens for every running request; fewer if one ends and another waits for its slot."""
        self._rows, *block = _run(
            self._model, self._rows, steps, bool(self._queue), self._loop, self._tap, self._backend
        )
        tokens, logprobs, counts = jax.device_get(block)
        for slot, count in enumerate(counts):
            self._record(slot, tokens[:count, slot].tolist(), logprobs[:count, slot].tolist())

    def _record(self, slot: int, tokens: list[int], logprobs: list[float]) -> None:
        """Makes events of a slot's new tokens. What follows a stop string in a block is dropped."""
        task = self._tasks[slot]
        if task is None:
            return
        for token, logprob in zip(tokens, logprobs, strict=True):
            self._events.append(task.add(token, logprob))
            if task.finish is not None:
                text = "" if task.text is None else task.text.text
                done = Completion(task.number, tuple(task.tokens), tuple(task.logprobs), text, task.finish)
                self._events.append(done)
                if task.text is not None and task.text.stopped:
                    self._rows = _end(self._rows, slot)
                self._tasks[slot] = None
                return

    def _check_prefix(self, prefix: Prefix) -> None:
        if prefix.cache.capacity != self._rows.cache.capacity:
            raise ValueError(f"prefix is for capacity {prefix.cache.capacity}, expected {self._rows.cache.capacity}")

    def _check_fits(self, given: int, new: int) -> None:
        if given + new > self.capacity:
            raise ValueError(f"{given} tokens and {new} new ones: expected at most the capacity, {self.capacity}")


@struct.dataclass
class _Rows:
    """What the device holds of `b` slots.

    Attributes:
        cache: all tokens but the last.
        token: the last one, chosen and not taken in yet, int32 [b].
        live: whether the row goes on, bool [b].
        left: tokens it may still add, int32 [b].
        stops: its stop tokens, bool [b, v].
        seen: tokens of its prompt and continuation, bool [b, v].
        sampling: how it chooses.
    """

    cache: Cache
    token: Array
    live: Array
    left: Array
    stops: Array
    seen: Array
    sampling: SamplingRows


def _placed(rows: _Rows) -> _Rows:
    """The rows, divided over the mesh that is set as those of the cache are; all else is whole, so as to sample."""
    axis, _ = row_axes(len(rows.live), cached=True)

    def by_rows(array: Array) -> Array:
        return constrain(array, axis, *[None] * (array.ndim - 1))

    fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    cache = placed(fields.pop("cache"))
    return _Rows(cache=cache, **jax.tree.map(by_rows, fields))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="memory", keep_unused=True)
def _empty_row(config: ModelConfig, capacity: int, dtype: DTypeLike, memory: Cache | None) -> Cache:
    """An empty cache of one row, in place of another one if that is given."""
    return init_cache(config, 1, capacity, dtype)


@partial(jax.jit, donate_argnames="memory", keep_unused=True)
def _copy(cache: Cache, memory: Cache | None) -> Cache:
    """The same in memory of its own, in place of another one if that is given."""
    return jax.tree.map(jnp.copy, cache)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_rows(config: ModelConfig, b: int, capacity: int, dtype: DTypeLike) -> _Rows:
    rows = _Rows(
        cache=init_cache(config, b, capacity, dtype),
        token=jnp.zeros(b, jnp.int32),
        live=jnp.zeros(b, bool),
        left=jnp.zeros(b, jnp.int32),
        stops=jnp.zeros((b, config.vocab_size), bool),
        seen=jnp.zeros((b, config.vocab_size), bool),
        sampling=jax.tree.map(jnp.asarray, SamplingRows.stack([GREEDY] * b)),
    )
    return _placed(rows)


@partial(jax.jit, donate_argnames="rows")
def _end(rows: _Rows, slot: int) -> _Rows:
    """The rows, one of them live no more."""
    return _placed(dataclasses.replace(rows, live=rows.live.at[slot].set(False)))


@partial(jax.jit, donate_argnames="rows")
def _insert(
    rows: _Rows,
    slot: int,
    cache: Cache | None,
    logits: Array,
    left: int,
    stops: Array,
    seen: Array,
    sampling: SamplingRows,
) -> tuple[_Rows, Array, Array]:
    """The rows with a new one in a slot, its first token chosen; that token and its log-probability.

    Cache, logits and sampling are of one row; stops and seen are [v]. There is no cache to put in where the one row
    has it already.
    """
    row = _Rows(
        cache=rows.cache if cache is None else cache,
        token=jnp.zeros(1, jnp.int32),
        live=jnp.ones(1, bool),
        left=jnp.full(1, left, jnp.int32),
        stops=stops[None],
        seen=seen[None],
        sampling=sampling,
    )
    row, logprob = _choose(row, logits)
    rows = row if cache is None else jax.tree.map(lambda all_rows, one: all_rows.at[slot].set(one[0]), rows, row)
    return _placed(rows), row.token[0], logprob[0]


@partial(jax.jit, static_argnames=("loop", "tap", "backend"), donate_argnames="rows", compiler_options=APART)
def _run(
    model: LanguageModel, rows: _Rows, steps: int, refill: bool, loop: bool, tap: Tap, backend: Backend
) -> tuple[_Rows, Array, Array, Array]:
    """Up to `steps` tokens for every live row: until none is live, or, with `refill`, until one ends.

    The loop is the same program for any number of steps; nothing leaves the device before it ends. Without `loop` it is
    one step, whatever `steps` says.

    Returns:
        The rows; tokens and log-probabilities [BLOCK, b], or [1, b]; and how many of them each row has, [b].
    """
    begin, shape = rows, (BLOCK if loop else 1, rows.token.shape[0])
    tokens, logprobs = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, at_least_fp32(model.dtype))

    def go_on(carry: tuple[Array, _Rows, Array, Array]) -> Array:
        i, rows, *_ = carry
        return (i < steps) & jnp.where(refill, (rows.live == begin.live).all(), rows.live.any())

    def step(carry: tuple[Array, _Rows, Array, Array]) -> tuple[Array, _Rows, Array, Array]:
        i, rows, tokens, logprobs = carry
        logits, cache = model.step(rows.token, rows.cache, tap=tap, backend=backend)
        rows, logprob = _choose(dataclasses.replace(rows, cache=cache), logits)
        return i + 1, rows, tokens.at[i].set(rows.token), logprobs.at[i].set(logprob)

    first = jnp.int32(0), rows, tokens, logprobs
    _, rows, tokens, logprobs = jax.lax.while_loop(go_on, step, first) if loop else step(first)
    return _placed(rows), tokens, logprobs, begin.left - rows.left


def _choose(rows: _Rows, logits: Array) -> tuple[_Rows, Array]:
    """The rows with their next tokens, and the tokens' log-probabilities. What happens in dead rows has no meaning.

    Dead rows are held at length 0, so that attention costs what the live ones need.
    """
    axis, _ = row_axes(len(logits), cached=True)
    logits = constrain(constrain(logits, axis, "vocab"), axis, None)  # gathered, and not the head that makes them
    token = sample(logits, rows.sampling, rows.seen, rows.cache.lengths)
    row, left = jnp.arange(token.shape[0]), rows.left - rows.live
    live = rows.live & (left > 0) & ~rows.stops[row, token]
    seen = rows.seen.at[row, token].set(True)
    cache = dataclasses.replace(rows.cache, lengths=jnp.where(live, rows.cache.lengths, 0))
    rows = dataclasses.replace(rows, cache=cache, token=token, live=live, left=left, seen=seen)
    return rows, log_probability(logits, token)


def _mask(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """True at the tokens, [v]."""
    mask = np.zeros(vocab_size, bool)
    mask[np.asarray(tokens, int)] = True
    return mask
