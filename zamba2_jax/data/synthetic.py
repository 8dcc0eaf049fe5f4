"""Synthetic tasks that need what attention does: rows of examples made on the way, of which only answers are learnt.

A source of examples is a function of seed and index, like all others: row i of a stream holds the same examples
whenever, and on whichever host, it is made. Examples are documents in the tokenizer's frame. Their symbols are ordinary
ids of the tokenizer, never special tokens: spread evenly over the vocabulary, and the same for a task whatever the
seed, so that what is learnt in training is asked for in evaluation.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np

from zamba2_jax.data.batches import PAD, Batch, Source
from zamba2_jax.data.sources import SourceConfig, open_documents
from zamba2_jax.text.frame import Frame, frame_of
from zamba2_jax.text.tokenizer import Tokenizer

HELD_OUT = (0x68656C64,) * 5
"""In place of the seeds of a stream, for the rows that are held out; streams have three numbers."""


MISSES = 8
"""Examples that find no room in a row until the row is done."""


class Example(NamedTuple):
    """One example of a task, without its frame.

    Attributes:
        tokens: ids, int [t].
        weights: 1 for answers, 0 for the rest, [t].
    """

    tokens: np.ndarray
    weights: np.ndarray


class Ids(NamedTuple):
    """What examples are made of.

    Attributes:
        symbols: distinct ordinary ids, of which a task takes the first ones for its markers.
        encode: the ids of a text, without special tokens.
        frame: around every example.
    """

    symbols: np.ndarray
    encode: Callable[[str], np.ndarray]
    frame: Frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the tasks have in common.

    Attributes:
        held_out_rows: rows to evaluate on, where the task is a source of `evaluation`.

    Raises:
        ValueError: a value breaks a rule; the message names task, field, value and rule.
    """

    held_out_rows: int = 64

    def __post_init__(self) -> None:
        self._require("held_out_rows", self.held_out_rows >= 1, "at least 1")

    @property
    def _id_count(self) -> int:
        """Distinct ids that an example takes from the vocabulary."""
        raise NotImplementedError

    def _size(self, ids: Ids) -> int:
        """Tokens of the longest example."""
        raise NotImplementedError

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        """One example."""
        raise NotImplementedError

    def _require(self, field: str, valid: bool, rule: str) -> None:
        if not valid:
            kind = getattr(self, "kind", type(self).__name__)
            raise ValueError(f"source of kind {kind!r}: {field}={getattr(self, field)!r}: expected {rule}")

    def _require_range(self, field: str, low: int = 1) -> None:
        first, last = getattr(self, field)
        self._require(field, low <= first <= last, f"two integers, the first at least {low}, the second no smaller")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """A random string, a marker, and the string again, which is the answer.

    Attributes:
        symbols: of which the string is made.
        lengths: of the string, from and to.
        distinct: whether no symbol stands twice in a string, so that the one before it says what comes next.
    """

    kind: Literal["copying"] = "copying"
    symbols: int = 64
    lengths: tuple[int, int] = (8, 24)
    distinct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("symbols", self.symbols >= 2, "at least 2")
        self._require_range("lengths")
        enough = not self.distinct or self.symbols >= self.lengths[1]
        self._require("symbols", enough, f"at least the longest string, {self.lengths[1]}, if they are distinct")

    @property
    def _id_count(self) -> int:
        return 1 + self.symbols

    def _size(self, ids: Ids) -> int:
        return 2 * self.lengths[1] + 1

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        length = _between(random, self.lengths)
        string = random.choice(ids.symbols[1:], length, replace=not self.distinct)
        return _joined((string, 0), (ids.symbols[:1], 0), (string, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """A random string in which a trigger stands once, and at the end the trigger again: what followed it is the answer.

    The task of arXiv:2312.00752, section 4.1.2.

    Attributes:
        symbols: of which the string is made.
        lengths: of the string with trigger and what follows it, from and to.
    """

    kind: Literal["induction"] = "induction"
    symbols: int = 16
    lengths: tuple[int, int] = (8, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("symbols", self.symbols >= 2, "at least 2")
        self._require_range("lengths", 2)

    @property
    def _id_count(self) -> int:
        return 1 + self.symbols

    def _size(self, ids: Ids) -> int:
        return self.lengths[1] + 2

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        string = random.choice(ids.symbols[1:], _between(random, self.lengths))
        place = random.integers(len(string) - 1)
        string[place] = ids.symbols[0]
        return _joined((string, 0), (ids.symbols[:1], 0), (string[place + 1 : place + 2], 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs of a key and a value, then keys again in another order, each followed by its value, which is the answer.

    Multi-query associative recall (arXiv:2312.04927).

    Attributes:
        keys, values: how many there are; no id is both.
        pairs: in an example, from and to; the keys of an example differ.
        queries: keys that are asked for, each once; None for all.
        gaps: values at random before each query, from and to, which answer nothing.
    """

    kind: Literal["recall"] = "recall"
    keys: int = 32
    values: int = 32
    pairs: tuple[int, int] = (4, 16)
    queries: int | None = None
    gaps: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("values", self.values >= 2, "at least 2")
        self._require_range("pairs")
        self._require("keys", self.keys >= self.pairs[1], f"at least the pairs, {self.pairs[1]}")
        self._require("queries", self.queries is None or self.queries >= 1, "at least 1")
        self._require_range("gaps", 0)

    @property
    def _id_count(self) -> int:
        return self.keys + self.values

    def _size(self, ids: Ids) -> int:
        return 2 * self.pairs[1] + self._asked(self.pairs[1]) * (2 + self.gaps[1])

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        keys, values = np.split(ids.symbols, [self.keys])
        key = random.choice(keys, _between(random, self.pairs), replace=False)
        value = random.choice(values, len(key))
        parts = [(np.stack([key, value], axis=1).ravel(), 0)]
        for query in random.permutation(len(key))[: self._asked(len(key))]:
            gap = random.choice(values, _between(random, self.gaps))
            parts += [(gap, 0), (key[query : query + 1], 0), (value[query : query + 1], 1)]
        return _joined(*parts)

    def _asked(self, pairs: int) -> int:
        return pairs if self.queries is None else min(self.queries, pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Symbols among noise, a marker, and the symbols again without the noise, which are the answer.

    The task of arXiv:2312.00752, section 4.1.1: how far apart the symbols are differs each time.

    Attributes:
        symbols: that are copied.
        noise: other symbols.
        counts: of symbols to copy, from and to.
        lengths: of symbols and noise together, from and to.
    """

    kind: Literal["selective_copying"] = "selective_copying"
    symbols: int = 16
    noise: int = 1
    counts: tuple[int, int] = (4, 8)
    lengths: tuple[int, int] = (16, 48)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("symbols", self.symbols >= 2, "at least 2")
        self._require("noise", self.noise >= 1, "at least 1")
        self._require_range("counts")
        self._require_range("lengths", self.counts[1])

    @property
    def _id_count(self) -> int:
        return 1 + self.symbols + self.noise

    def _size(self, ids: Ids) -> int:
        return self.lengths[1] + 1 + self.counts[1]

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        marker, symbols, noise = np.split(ids.symbols, [1, 1 + self.symbols])
        string = random.choice(noise, _between(random, self.lengths))
        kept = random.choice(symbols, _between(random, self.counts))
        string[np.sort(random.choice(len(string), len(kept), replace=False))] = kept
        return _joined((string, 0), (marker, 0), (kept, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """A number somewhere in filler text, and at the end the question for it; the number again is the answer.

    The text of arXiv:2305.16300, section 4.2, in the tokens of the tokenizer.

    Attributes:
        digits: of the number.
        lengths: of an example without its answer, in tokens, from and to; filled with whole sentences.
    """

    kind: Literal["passkey"] = "passkey"
    digits: int = 5
    lengths: tuple[int, int] = (96, 448)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("digits", 1 <= self.digits <= 18, "1 to 18")
        self._require_range("lengths")

    @property
    def _id_count(self) -> int:
        return 0

    def _size(self, ids: Ids) -> int:
        shortest = len(self._frame(ids, "0" * self.digits)[0]) + len(ids.encode(_QUESTION))
        if self.lengths[0] < shortest:
            self._require("lengths", False, f"at least the {shortest} tokens of statement and question")
        # In the statement and in the answer a number takes at most a token to a character, and one or two around it.
        return self.lengths[1] + 2 * (self.digits + 3)

    def _example(self, random: np.random.Generator, ids: Ids) -> Example:
        number = "".join(map(str, random.integers(10, size=self.digits)))
        statement, answer = self._frame(ids, number)
        question, sentences = ids.encode(_QUESTION), [ids.encode(sentence) for sentence in _FILLER]
        room = _between(random, self.lengths) - len(statement) - len(question)
        filler: list[np.ndarray] = []
        while (room := room - len(sentences[len(filler) % len(sentences)])) >= 0:
            filler.append(sentences[len(filler) % len(sentences)])
        place = random.integers(len(filler) + 1)
        return _joined(
            *((sentence, 0) for sentence in filler[:place]),
            (statement, 0),
            *((sentence, 0) for sentence in filler[place:]),
            (question, 0),
            (answer, 1),
        )

    def _frame(self, ids: Ids, number: str) -> tuple[np.ndarray, np.ndarray]:
        """The statement of a number, and the number, in the same ids as there."""
        answer = ids.encode(f" {number}")
        parts = (ids.encode(" The pass key is"), answer, ids.encode(". Remember it."))
        return np.concatenate(parts), answer


_FILLER = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")
_QUESTION = " What is the pass key? The pass key is"

AnySource = SourceConfig | Copying | Induction | Recall | SelectiveCopying | Passkey
SyntheticConfig = Copying | Induction | Recall | SelectiveCopying | Passkey


class SyntheticRows(grain.MapDataset[Batch]):
    """Rows of `length` tokens with as many examples of a task as find room, each a document of its own; no end."""

    def __init__(self, task: Task, ids: Ids, length: int, entropy: Sequence[int]):
        """Row i is a function of `entropy` and i.

        Raises:
            ValueError: an example may be longer than a row.
        """
        super().__init__()
        size = task._size(ids) + ids.frame.size
        if size > length:
            raise ValueError(
                f"source of kind {getattr(task, 'kind', '')!r}: its examples take up to {size} tokens with their "
                f"frame: expected at most the length of a row, {length}"
            )
        self._task, self._ids, self._length, self._entropy = task, ids, length, tuple(entropy)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        """A row, of which each array is [t]; or a slice of the rows."""
        if isinstance(index, slice):
            return self.slice(index)
        random = np.random.default_rng((*self._entropy, index))
        tokens, segment_ids = np.full(self._length, PAD, np.int32), np.zeros(self._length, np.int32)
        weights = np.zeros(self._length, np.float32)
        begin = 0
        for number, example in enumerate(self._examples(random), 1):
            before, after = self._ids.frame
            first = begin + len(before)
            end = first + len(example.tokens) + len(after)
            tokens[begin:end] = [*before, *example.tokens, *after]
            segment_ids[begin:end], weights[first : end - len(after)] = number, example.weights
            begin = end
        return Batch(tokens=tokens, segment_ids=segment_ids, weights=weights)

    def _examples(self, random: np.random.Generator) -> Iterator[Example]:
        """Those of a row: what finds no room is drawn again, a few times, so that short ones fill it up."""
        room, misses = self._length, 0
        while misses < MISSES:
            example = self._task._example(random, self._ids)
            size = len(example.tokens) + self._ids.frame.size
            if size > room:
                misses += 1
                continue
            room -= size
            yield example


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A task as a source of rows; see `data.batches.RowSource`.

    Attributes:
        task: what its examples are.
        ids: what they are made of.
    """

    task: Task
    ids: Ids

    def training_rows(self, length: int, entropy: Sequence[int]) -> SyntheticRows:
        """New rows without end.

        Raises:
            ValueError: as `SyntheticRows`.
        """
        return SyntheticRows(self.task, self.ids, length, entropy)

    def held_out_rows(self, length: int) -> Sequence[Batch]:
        """The `held_out_rows` of the task, which are in no stream of training rows.

        Raises:
            ValueError: as `SyntheticRows`.
        """
        rows = SyntheticRows(self.task, self.ids, length, HELD_OUT)
        return [rows[index] for index in range(self.task.held_out_rows)]


def open_synthetic(task: SyntheticConfig, tokenizer: Tokenizer | None, *, vocab_size: int) -> Synthetic:
    """The task in the ids of a tokenizer.

    Args:
        task: its sizes.
        tokenizer: whose ids, special tokens left out, examples are made of.
        vocab_size: of the model; ids outside of it are left out too.

    Raises:
        ValueError: there is no tokenizer, or it has too few ids.
    """
    if tokenizer is None:
        raise ValueError(f"a source of kind {task.kind!r} takes a tokenizer")
    frame = frame_of(tokenizer)
    special = {id_ for id_, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    ordinary = sorted({*tokenizer.backend.get_vocab().values()} - special - {*frame.begin, *frame.end})
    ordinary = [id_ for id_ in ordinary if id_ < vocab_size]
    if len(ordinary) < max(task._id_count, 1):
        raise ValueError(
            f"source of kind {task.kind!r} takes {task._id_count} ids: the tokenizer has {len(ordinary)} that are no "
            f"special tokens in a vocabulary of {vocab_size}"
        )
    places = np.arange(task._id_count) * len(ordinary) // max(task._id_count, 1)
    symbols = np.array(ordinary, np.int32)[places]
    # The first of each kind would be neighbours else: in an order of its own, always the same.
    symbols = np.random.default_rng(0).permutation(symbols)

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)

    return Synthetic(task, Ids(symbols, encode, frame))


def open_source(config: AnySource, tokenizer: Tokenizer | None, *, vocab_size: int) -> Source:
    """A source of any kind.

    Raises:
        ValueError, OSError: as `open_documents`, `open_synthetic`.
    """
    if isinstance(config, SourceConfig):
        return open_documents(config, tokenizer, vocab_size=vocab_size)
    return open_synthetic(config, tokenizer, vocab_size=vocab_size)


def _between(random: np.random.Generator, ends: tuple[int, int]) -> int:
    """An integer, both ends included, its logarithm about uniform: a task is learnt from its short examples."""
    low, high = np.log(np.add(ends, (1, 2)))
    return min(int(np.exp(random.uniform(low, high))) - 1, ends[1])


def _joined(*parts: tuple[np.ndarray, int]) -> Example:
    """Pieces, each with the weight of its tokens."""
    weights = [np.full(len(tokens), weight, np.float32) for tokens, weight in parts]
    return Example(np.concatenate([tokens for tokens, _ in parts]), np.concatenate(weights))
