"""Many prompts, from JSON lines to JSON lines, in a job that can be broken off and taken up again.

A line in is an object with "prompt", a string, or "tokens", token ids; and whichever it needs of "id",
"max_new_tokens", "stop" (a string or several) and the fields of `Sampling`. A line out has "id", "prompt" (as it was
given), "text" (with a tokenizer), "tokens", "finish", and "logprobs" if asked for. Lines come out as they are done, not
in the order they went in: that is what ids are for.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from zamba2_jax.generate.decode import check_tokens
from zamba2_jax.generate.engine import Completion, Engine, Request
from zamba2_jax.generate.sampling import Sampling
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.text.stream import Tokenizer, token_lists

_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
_KEYS = {"id", "prompt", "tokens", "max_new_tokens", "stop", *_SAMPLING}


@dataclasses.dataclass(frozen=True)
class Job:
    """A line to work on.

    Attributes:
        id: given, or the index of the line among those that are not blank.
        prompt: as it was given.
        request: with the prompt's tokens.
    """

    id: str | int
    prompt: str | Sequence[int]
    request: Request


def read_jobs(
    lines: Iterable[bytes],
    defaults: Request,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    capacity: int | None = None,
) -> list[Job]:
    """The jobs that lines describe. Blank lines are passed over.

    Args:
        lines: JSON objects in UTF-8.
        defaults: for what a line leaves out. Job i has the seed after it by i, so that a prompt given twice is
            continued in two ways.
        tokenizer: for prompts that are strings.
        vocab_size: ids are below it.
        capacity: most tokens of a prompt and its continuation.

    Raises:
        ValueError: a line is not valid; the message begins with its number. Or there is none.
    """
    jobs: list[Job] = []
    numbers: dict[str | int, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = make_job(_object(line), len(jobs), defaults, tokenizer, vocab_size, capacity)
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
    tokenizer: Tokenizer | None,
    vocab_size: int,
    capacity: int | None,
) -> Job:
    """The job that an object describes; see `read_jobs`.

    Raises:
        ValueError: a key is unknown, or a value is not valid.
    """
    unknown = sorted(set(line) - _KEYS)
    if unknown:
        raise ValueError(f"key {unknown[0]!r} is unknown, expected some of {', '.join(sorted(_KEYS))}")
    name = line.get("id", index)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"id={name!r}: expected a string or an integer")
    prompt, tokens = _prompt(line, tokenizer, vocab_size)
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
    return Job(name, prompt, request)


def make_engine(
    model: Zamba2, jobs: Sequence[Job], *, tokenizer: Tokenizer | None, slots: int = 8, capacity: int | None = None
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
    decode = None if tokenizer is None else tokenizer.decode
    return Engine.for_requests(model, [job.request for job in jobs], slots=slots, capacity=capacity, decode=decode)


def run_jobs(engine: Engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, Completion]]:
    """Works on jobs, and gives each as it is done."""
    running = {engine.submit(job.request): job for job in jobs}
    for event in engine.events(streaming=False):
        if isinstance(event, Completion):
            yield running[event.request], event


def result(job: Job, done: Completion, *, text: bool, logprobs: bool) -> dict[str, Any]:
    """The line out, with text and log-probabilities or without."""
    line = {"id": job.id, "prompt": job.prompt} | ({"text": done.text} if text else {})
    line |= {"tokens": done.tokens, "finish": done.finish}
    return line | ({"logprobs": done.logprobs} if logprobs else {})


def find_results(path: Path, jobs: Sequence[Job], *, resume: bool) -> set[str | int]:
    """The ids of jobs whose results a file holds. A last line that was cut short while it was written is none.

    Raises:
        FileExistsError: the file exists, and `resume` is not set.
        FileNotFoundError: there is no directory for it.
        ValueError: it holds something else than results of these jobs.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    if not path.exists():
        return set()
    if not resume:
        raise FileExistsError(f"{path} exists: expected a new file, or --resume to go on with it")
    prompts = {job.id: job.prompt for job in jobs}
    done: set[str | int] = set()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found = _object(line)
            known = prompts[found["id"]] == found["prompt"]
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"{path}, line {number}, is not the result of any of these prompts: expected another file")
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


def _prompt(line: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[str | list[int], list[int]]:
    """The prompt as given, and its token ids."""
    if ("prompt" in line) == ("tokens" in line):
        raise ValueError("expected one of prompt and tokens")
    prompt = line.get("prompt", line.get("tokens"))
    if not isinstance(prompt, str if "prompt" in line else list):
        kind = "text" if "prompt" in line else "a list of token ids"
        raise ValueError(f"{'prompt' if 'prompt' in line else 'tokens'}={prompt!r}: expected {kind}")
    if prompt == "":
        raise ValueError("prompt is empty, expected text")
    if isinstance(prompt, str) and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"prompt={prompt!r} has half of a surrogate pair, expected text")
    tokens = token_lists([prompt], tokenizer)[0] if isinstance(prompt, str) else prompt
    return prompt, check_tokens(tokens, vocab_size, "prompt").tolist()


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop={value!r}: expected a string, or a list of strings, none empty")
    return stops
