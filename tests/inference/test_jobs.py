import dataclasses
import json
import re

import pytest

from tests.inference.checkpoints import CONFIG, write_checkpoint
from tests.text.kinds import byte_level
from zamba2_jax import Request, Sampling, generate, load_hf
from zamba2_jax.inference.jobs import (
    check_settings,
    find_results,
    make_engine,
    open_results,
    read_jobs,
    result,
    run_jobs,
    settings_of,
    write_result,
)
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer

DEFAULTS = Request((), 6, Sampling(seed=3), (2,))
LINES = (
    b'{"prompt": "the cat"}',
    b"",
    b'{"tokens": [5, 6, 7], "id": "b", "temperature": 2.0, "max_new_tokens": 9, "seed": 11}',
    b'{"prompt": "the cat", "temperature": 2.0}',
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("batch") / "model")
    return load_hf(directory), load_tokenizer(directory)


def jobs_of(lines, tokenizer=None, **options):
    return read_jobs(lines, DEFAULTS, tokenizer=tokenizer, vocab_size=CONFIG.vocab_size, **options)


def work(checkpoint, jobs, left):
    model, tokenizer = checkpoint
    engine = make_engine(model, jobs, tokenizer=tokenizer, slots=2)
    return [result(job, done, text=True, logprobs=True) for job, done in run_jobs(engine, left)]


def test_lines_come_out_as_generate_has_them(checkpoint):
    model, tokenizer = checkpoint
    jobs = jobs_of(LINES, tokenizer)
    assert [job.id for job in jobs] == [0, "b", 2]
    lines = {line["id"]: line for line in work(checkpoint, jobs, jobs)}
    samplings = [Sampling(seed=3), Sampling(temperature=2.0, seed=11), Sampling(temperature=2.0, seed=5)]
    prompts = [tokenizer.encode("the cat"), [5, 6, 7], tokenizer.encode("the cat")]
    expected = generate(model, prompts, 9, samplings, stop_tokens=[2], slots=2)
    for job, tokens in zip(jobs, expected, strict=True):
        line, new = lines[job.id], job.request.max_new_tokens
        assert list(line["tokens"]) == tokens[:new]
        assert (
            line["text"]
            == tokenizer.decode([*job.request.prompt, *tokens[:new]])[len(tokenizer.decode(job.request.prompt)) :]
        )
        assert line["finish"] == ("length" if len(line["tokens"]) == new else "stop")
        assert len(line["logprobs"]) == len(line["tokens"])
    assert (lines[0]["prompt"], lines["b"]["prompt"]) == ("the cat", [5, 6, 7])


def test_a_job_that_is_broken_off_goes_on_to_the_same_results(checkpoint, tmp_path):
    """Also if it was broken off within a line."""
    jobs, path = jobs_of(LINES, checkpoint[1]), tmp_path / "out.jsonl"
    whole = {line["id"]: line for line in work(checkpoint, jobs, jobs)}
    with open_results(path) as file:
        write_result(file, whole["b"])
        file.write(b'{"id": 0, "prompt": "the')
    assert find_results(path, jobs, resume=True) == {"b"}
    with open_results(path) as file:
        for line in work(checkpoint, jobs, [job for job in jobs if job.id != "b"]):
            write_result(file, line)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["id"]: line for line in lines} == {i: json.loads(json.dumps(line)) for i, line in whole.items()}
    assert len(lines) == 3
    with pytest.raises(FileExistsError, match=r"out.jsonl exists: expected a new file, or --resume"):
        find_results(path, jobs, resume=False)
    other = [dataclasses.replace(job, prompt="another") for job in jobs]
    with pytest.raises(ValueError, match=r"out.jsonl, line 1, is not the result of any of these prompts"):
        find_results(path, other, resume=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes, at character 2"),
        ("[1]", "[1]: expected an object"),
        ('{"promt": "x"}', "key 'promt' is unknown, expected some of id, max_new_tokens, messages, min_p"),
        ("{}", "no prompt: expected one of prompt, messages, tokens"),
        ('{"prompt": "x", "tokens": [1]}', "prompt and tokens: expected one of prompt, messages, tokens"),
        ('{"messages": "x"}', 'messages="x": expected a list of objects with "role" and "content"'),
        ('{"messages": [{"content": "x"}]}', 'messages=[{"content": "x"}]: expected a list of objects with'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages have half of a surrogate pair"),
        ('{"prompt": 5}', "prompt=5: expected text"),
        ('{"tokens": []}', "prompt is empty, expected at least one token"),
        ('{"tokens": [290]}', "prompt holds token 290, expected ids in [0, 290)"),
        ('{"tokens": "x"}', "tokens='x': expected a list of token ids"),
        ('{"tokens": [1], "id": true}', "id=True: expected a string or an integer"),
        ('{"tokens": [1], "id": 0}', "id 0 is that of line 1 too"),
        ('{"tokens": [1], "stop": 5}', "stop=5: expected a string, or a list of strings, none empty"),
        ('{"tokens": [1], "stop": ["a", ""]}', "stop=['a', '']: expected a string, or a list"),
        ('{"tokens": [1], "top_p": 0}', "top_p=0: expected a number in (0, 1]"),
        ('{"tokens": [1], "top_p": "0.5"}', "top_p='0.5': expected a number in (0, 1]"),
        ('{"tokens": [1], "temperature": NaN}', "temperature=nan: expected a finite number"),
        ('{"tokens": [1], "max_new_tokens": 0}', "max_new_tokens=0: expected an integer, at least 1"),
        ('{"tokens": [1, 2, 3], "max_new_tokens": 8}', "3 tokens and 8 new ones: expected at most the capacity, 10"),
        ('{"prompt": "\\ud800"}', "prompt 0 is '\\ud800', with half of a surrogate pair: expected text"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(checkpoint, line, message):
    with pytest.raises(ValueError, match=re.escape(f"line 3: {message}")):
        jobs_of([b'{"prompt": "x"}', b"\n", line.encode()], checkpoint[1], capacity=10)


def test_null_is_as_if_a_key_were_not_there_and_a_file_may_begin_with_a_mark(checkpoint):
    keys = ("id", "max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    line = json.dumps({"prompt": "the cat", "tokens": None} | dict.fromkeys(keys))
    (job,) = jobs_of([b"\xef\xbb\xbf" + line.encode()], checkpoint[1])
    assert job == jobs_of([b'{"prompt": "the cat"}'], checkpoint[1])[0]
    (job,) = jobs_of([b'{"tokens": [1], "seed": 18446744073709551615, "top_k": 0}'])
    assert (job.request.sampling.seed, job.request.sampling.top_k) == (2**64 - 1, 0)


def test_an_empty_prompt_is_what_the_tokenizer_puts_before_every_text(checkpoint):
    (job,) = jobs_of([b'{"prompt": ""}'], checkpoint[1])
    assert job.request.prompt == [1]
    silent = Tokenizer(byte_level(["<a>"]))
    with pytest.raises(ValueError, match="line 1: prompt 0 is empty, expected text"):
        jobs_of([b'{"prompt": ""}'], silent)


def test_a_chat_is_continued_by_the_template(checkpoint):
    tokenizer = checkpoint[1]
    messages = [{"role": "user", "content": "the <eos> cat"}]
    line = json.dumps({"messages": messages}).encode()
    (job,) = jobs_of([line], tokenizer)
    assert job.request.prompt == tokenizer.encode_chat(messages)
    assert job.request.prompt.count(2) == 2
    (as_text,) = jobs_of([line], tokenizer, special_tokens=False)
    assert as_text.request.prompt.count(2) == 1
    assert job.given == {"messages": messages}
    with pytest.raises(ValueError, match="line 1: messages: expected a tokenizer with a chat template"):
        jobs_of([line])


JOB = {"model": {"name": "a", "fingerprint": "1"}, "temperature": 0.0, "max_new_tokens": 6}


def test_results_of_another_job_are_refused_and_what_differs_is_named(checkpoint, tmp_path):
    path = tmp_path / "out.jsonl"
    jobs = jobs_of([b'{"tokens": [5], "id": "a", "seed": 3}', b'{"tokens": [6], "id": "b"}'])
    check_settings(path, settings_of(jobs, **JOB), set())
    check_settings(path, settings_of(jobs, **JOB), {"a"})
    # The same weights in another place, and more lines after those that are done.
    more = [*jobs, *jobs_of([b'{"tokens": [7], "id": "c"}'])]
    check_settings(path, settings_of(more, **JOB | {"model": {"name": "b", "fingerprint": "1"}}), {"a"})
    other = jobs_of([b'{"tokens": [6], "id": "b"}', b'{"tokens": [5], "id": "a", "seed": 4, "temperature": 1}'])
    changed = {"model": {"name": "b", "fingerprint": "2"}, "temperature": 1.0, "max_new_tokens": 7}
    with pytest.raises(ValueError, match="were made by another job") as caught:
        check_settings(path, settings_of(other, **changed), {"a", "b"})
    lines = sorted(caught.value.args[0].split("\n  ")[1:])
    assert lines == [
        "line 'a': seed: 3 before, 4 now",
        "line 'a': temperature: None before, 1 now",
        "max_new_tokens: 6 before, 7 now",
        "model: {'name': 'b', 'fingerprint': '1'} before, {'name': 'b', 'fingerprint': '2'} now",
        "temperature: 0.0 before, 1.0 now",
    ]
    # Where tokens are drawn, the place of a line gives its seed.
    check_settings(path, settings_of(jobs, **JOB | {"temperature": 1.0}), set())
    with pytest.raises(ValueError, match=r"another job:\n  line 'b': number 1 before, 0 now$"):
        check_settings(path, settings_of([jobs[1], jobs[0]], **JOB | {"temperature": 1.0}), {"a", "b"})
    (tmp_path / "out.jsonl.settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings.json does not say what the results in .*out.jsonl were made with"):
        check_settings(path, settings_of(jobs, **JOB), {"a"})
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"settings.json is missing"):
        check_settings(path, settings_of(jobs, **JOB), {"a"})


def test_strings_need_a_tokenizer_and_a_file_needs_lines():
    with pytest.raises(ValueError, match="line 1: prompts are strings: expected a tokenizer"):
        jobs_of([b'{"prompt": "x"}'])
    with pytest.raises(ValueError, match=r"line 1: stop=\['x'\]: expected a tokenizer"):
        jobs_of([b'{"tokens": [1], "stop": "x"}'])
    with pytest.raises(ValueError, match="there are no prompts: expected at least one line"):
        jobs_of([b"\n"])
