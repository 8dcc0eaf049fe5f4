"""Many prompts, from JSON lines to JSON lines, in a job that can be broken off and taken up again.

A line in is an object with "prompt", a string, or "messages", a chat, or "tokens", token ids; and whichever it needs of
"id", "max_new_tokens", "stop" (a string or several) and the fields of `Sampling`; null is as if a key were not there. A
line out has "id", "prompt" or "messages" (as it was given; of token ids "prompt" too), "text" (with a tokenizer),
"tokens", "finish", and "logprobs" if asked for. Lines come out as they are done, not in the order they went in: that is
what ids are for. Beside the results stands what they were made with, so that no other job goes on in their file.
"""

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from zamba2_jax.files import read_json, write_json
from zamba2_jax.inference.decode import check_tokens
from zamba2_jax.inference.engine import Completion, Engine, Request
from zamba2_jax.inference.sampling import Sampling
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.text.stream import TokenizerLike, has_lone_surrogate, token_lists
from zamba2_jax.text.tokenizer import Tokenizer

_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
_PROMPTS = ("prompt", "messages", "tokens")
_OWN = {"max_new_tokens", "stop", *_SAMPLING}
_KEYS = {"id", *_PROMPTS, *_OWN}


@dataclasses.dataclass(frozen=True)
class Job:
    """A line to work on.

    Attributes:
        id: given, or the index of the line among those that are not blank.
        prompt: as it was given: a text, the messages of a chat, or token ids.
        request: with the prompt's tokens.
        own: settings of the line's own.
    """

    id: str | int
    prompt: str | Sequence[Any]
    request: Request
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """The prompt as it stands in a result."""
        chat = not isinstance(self.prompt, str) and isinstance(next(iter(self.prompt), None), Mapping)
        return {"messages" if chat else "prompt": self.prompt}


def read_jobs(
    lines: Iterable[bytes],
    defaults: Request,
    *,
    tokenizer: TokenizerLike | None,
    vocab_size: int,
    capacity: int | None = None,
    special_tokens: bool = True,
) -> list[Job]:
    """The jobs that lines describe. Blank lines are passed over.

    Args:
        lines: JSON objects in UTF-8; the first may begin with a byte order mark.
        defaults: for what a line leaves out. Job i has the seed after it by i, so that a prompt given twice is
            continued in two ways.
        tokenizer: for prompts that are strings; for chats one with a chat template.
        vocab_size: ids are below it.
        capacity: most tokens of a prompt and its continuation.
        special_tokens: whether names of special tokens within the messages of a chat become these tokens.

    Raises:
        ValueError: a line is not valid; the message begins with its number. Or there is none.
    """
    jobs: list[Job] = []
    numbers: dict[str | int, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            job = make_job(_object(line), len(jobs), defaults, tokenizer, vocab_size, capacity, special_tokens)
            if job.id in numbers:
                raise ValueError(f"id {job.id!r} is that of line {numbers[job.id]} too")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        numbers[job.id] = number
        jobs.append(job)
    if not jobs:
        raise ValueError("there are no prompts: expected at least one line")
    return jobs


def make_job(
    line: Mapping[str, Any],
    index: int,
    defaults: Request,
    tokenizer: TokenizerLike | None,
    vocab_size: int,
    capacity: int | None,
    special_tokens: bool = True,
) -> Job:
    """The job that an object describes; see `read_jobs`.

    Raises:
        ValueError: a key is unknown, or a value is not valid.
    """
    unknown = sorted(set(line) - _KEYS)
    if unknown:
        raise ValueError(f"key {unknown[0]!r} is unknown, expected some of {', '.join(sorted(_KEYS))}")
    line = {key: value for key, value in line.items() if value is not None}
    name = line.get("id", index)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"id={name!r}: expected a string or an integer")
    prompt, tokens = _prompt(line, tokenizer, vocab_size, special_tokens)
    sampling = defaults.sampling.for_prompt(index)
    request = dataclasses.replace(
        defaults,
        prompt=tokens,
        max_new_tokens=line.get("max_new_tokens", defaults.max_new_tokens),
        sampling=dataclasses.replace(sampling, **{key: line[key] for key in _SAMPLING & set(line)}),
        stop_strings=_stops(line["stop"]) if "stop" in line else defaults.stop_strings,
    )
    if request.stop_strings and tokenizer is None:
        raise ValueError(f"stop={list(request.stop_strings)}: expected a tokenizer to find it with")
    if capacity is not None and len(tokens) + request.max_new_tokens > capacity:
        raise ValueError(
            f"{len(tokens)} tokens and {request.max_new_tokens} new ones: expected at most the capacity, {capacity}"
        )
    return Job(name, prompt, request, {key: line[key] for key in sorted(_OWN & set(line))})


def make_engine(
    model: LanguageModel,
    jobs: Sequence[Job],
    *,
    tokenizer: TokenizerLike | None,
    slots: int = 8,
    capacity: int | None = None,
) -> Engine:
    """An engine for jobs, without requests.

    Args:
        model: the model.
        jobs: all there are, those that are done too: the engine has one shape, and a job one result, however often the
            work is broken off.
        tokenizer: for texts.
        slots: most jobs that run at a time.
        capacity: most tokens of each; as many as the longest needs by default.
    """
    requests = [job.request for job in jobs]
    return Engine.for_requests(model, requests, slots=slots, capacity=capacity, tokenizer=tokenizer)


def run_jobs(engine: Engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, Completion]]:
    """Works on jobs, and gives each as it is done."""
    running = {engine.submit(job.request): job for job in jobs}
    for event in engine.events(streaming=False):
        if isinstance(event, Completion):
            yield running[event.request], event


def result(job: Job, done: Completion, *, text: bool, logprobs: bool) -> dict[str, Any]:
    """The line out, with text and log-probabilities or without."""
    line = {"id": job.id, **job.given} | ({"text": done.text} if text else {})
    line |= {"tokens": done.tokens, "finish": done.finish}
    return line | ({"logprobs": done.logprobs} if logprobs else {})


def settings_of(jobs: Sequence[Job], **job: Any) -> dict[str, Any]:
    """What results depend on, for JSON.

    Args:
        jobs: the lines.
        job: of the whole job: its model, defaults and whatever else its results depend on.
    """
    return {"job": json.loads(json.dumps(job)), "lines": [[job.id, dict(job.own)] for job in jobs]}


def settings_name(results: str) -> str:
    """The name of the file beside one of results that says what these were made with."""
    return f"{results}.settings.json"


def check_settings(path: Path, settings: Mapping[str, Any], done: set[str | int]) -> None:
    """Whether the results in a file were made as `settings` say; writes these beside a file without results.

    Args:
        path: of the results.
        settings: by `settings_of`.
        done: ids of the jobs whose results are there.

    Raises:
        ValueError: they were made otherwise; all differences are named.
        FileNotFoundError: nothing beside the file says how they were made.
    """
    file = path.with_name(settings_name(path.name))
    if not done:
        write_json(file, settings)
        return
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, which says what the results in {path} were made with")
    before = read_json(file)
    try:
        lines = _differences(before["job"], settings["job"])
        old, new = ({id_: (i, own) for i, (id_, own) in enumerate(s["lines"])} for s in (before, settings))
        sampled = before["job"].get("temperature") != 0
        for id_ in done:
            (place, own), (place_now, own_now) = old[id_], new[id_]
            # The place of a line gives the seed of its draws.
            if place != place_now and "seed" not in own and (sampled or own.get("temperature")):
                lines.append(f"line {id_!r}: number {place} before, {place_now} now")
            lines += [f"line {id_!r}: {line}" for line in _differences(own, own_now)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not say what the results in {path} were made with: {error!r}") from error
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"the results in {path} were made by another job:\n  {listed}")
    write_json(file, settings)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, a line each; two models are the same if their fingerprints are, wherever they lie."""

    def identity(value: Any) -> Any:
        return value["fingerprint"] if isinstance(value, dict) else value

    pairs = {key: (before.get(key), now.get(key)) for key in {**before, **now}}
    return [f"{key}: {a!r} before, {b!r} now" for key, (a, b) in pairs.items() if identity(a) != identity(b)]


def find_results(path: Path, jobs: Sequence[Job], *, resume: bool, name: str | None = None) -> set[str | int]:
    """The ids of jobs whose results a file holds. A last line that was cut short while it was written is none.

    Args:
        path: of the file.
        jobs: all there are.
        resume: whether it may be there.
        name: of the file in messages; its path by default.

    Raises:
        FileExistsError: the file exists, and `resume` is not set.
        FileNotFoundError: there is no directory for it.
        ValueError: it holds something else than results of these jobs.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    if not path.exists():
        return set()
    name = name or str(path)
    if not resume:
        raise FileExistsError(f"{name} exists: expected a new file, or --resume to go on with it")
    prompts = {job.id: job.given for job in jobs}
    done: set[str | int] = set()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found = _object(line)
            known = prompts[found["id"]].items() <= found.items()
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"{name}, line {number}, is not the result of any of these prompts: expected another file")
        done.add(found["id"])
    return done


def open_results(path: Path) -> BinaryIO:
    """A file to add results to, without half a line at its end."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    file = path.open("ab")
    file.truncate(whole)
    return file


def write_result(file: IO[bytes], line: Mapping[str, Any]) -> None:
    """Writes a line, which is in the file when this returns."""
    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg}, at character {error.pos + 1}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{json.dumps(found)[:40]}: expected an object")
    return found


def _prompt(
    line: Mapping[str, Any], tokenizer: TokenizerLike | None, vocab_size: int, special_tokens: bool
) -> tuple[str | list[Any], list[int]]:
    """The prompt as given, and its token ids."""
    given = [name for name in _PROMPTS if name in line]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'no prompt'}: expected one of {', '.join(_PROMPTS)}")
    prompt = line[given[0]]
    if given == ["messages"]:
        tokens = _chat(prompt, tokenizer, special_tokens)
    elif given == ["prompt"]:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r}: expected text")
        tokens = list(token_lists([prompt], tokenizer)[0])
    else:
        if not isinstance(prompt, list):
            raise ValueError(f"tokens={prompt!r}: expected a list of token ids")
        tokens = prompt
    return prompt, check_tokens(tokens, vocab_size, "prompt").tolist()


def _chat(messages: object, tokenizer: TokenizerLike | None, special_tokens: bool) -> list[int]:
    """Token ids of a chat."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError("messages: expected a tokenizer with a chat template")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f'messages={json.dumps(messages)[:60]}: expected a list of objects with "role" and "content"')
    if has_lone_surrogate(json.dumps(messages, ensure_ascii=False)):
        raise ValueError("messages have half of a surrogate pair, expected text")
    return tokenizer.encode_chat(messages, special_tokens=special_tokens)


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop={value!r}: expected a string, or a list of strings, none empty")
    return stops
