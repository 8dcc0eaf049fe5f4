"""The adapter for lm-evaluation-harness, in the harness, beside its own adapter of transformers."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.inference.checkpoints import CONFIG, TEXT, write_checkpoint
from zamba2_jax import generate, load_hf
from zamba2_jax.text.tokenizer import load_tokenizer

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs the extra eval, which is not installed", allow_module_level=True)

WORDS = TEXT.split()
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}


def documents(count=12):
    rng = np.random.default_rng(0)

    def words(least, most):
        return " ".join(rng.choice(WORDS, rng.integers(least, most)))

    for i in range(count):
        choices = [" " + words(1, 5) for _ in range(3)]
        yield {
            "question": words(1, 12),
            "choices": choices,
            "label": i % 3,
            "answer": words(1, 3),
            "text": words(3, 40),
        }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "model")


@pytest.mark.slow
def test_scores_are_those_of_transformers_in_the_same_harness(directory, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    pytest.importorskip("accelerate", reason="the harness's own adapter needs accelerate, which is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM

    from zamba2_jax.evaluate.harness import Harness
    from zamba2_jax.parity import reference

    max_length = 24  # shorter than some texts, which are then cut and rolled over
    theirs = HFLM(
        pretrained=reference.load(directory, CONFIG, "float32", reference.CHUNK_SIZE),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        batch_size=1,
        max_length=max_length,
    )
    ours = Harness(load_hf(directory), load_tokenizer(directory), batch_size=4, max_length=max_length)
    compare(ours, theirs, tmp_path)


@pytest.mark.slow
def test_answers_end_with_all_tokens_that_the_checkpoint_names(directory, tmp_path, monkeypatch):
    """Two of them; one is not special, and its text is in the answer, as in that of the harness's own class."""
    pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    pytest.importorskip("accelerate", reason="the harness's own adapter needs accelerate, which is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM

    from zamba2_jax.evaluate.harness import Harness

    ended = tmp_path / "model"
    shutil.copytree(directory, ended)
    # A token that the model likes to write, without the letter that ends an answer.
    tokenizer = load_tokenizer(ended)
    prompts = [tokenizer.encode(document["question"]) for document in documents()]
    likely = np.concatenate([row[1:4] for row in generate(load_hf(ended), prompts, 4, stop_tokens=[2])])
    second = int(next(id_ for id_ in likely if id_ > 2 and "e" not in tokenizer.decode([id_])))
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, second], "pad_token_id": 0}))
    assert load_tokenizer(ended).end_tokens == (2, second)
    ours = Harness(str(ended), batch_size=4, max_length=48)
    theirs = HFLM(pretrained=str(ended), batch_size=1, max_length=48, dtype="float32", device="cpu")
    found = compare(ours, theirs, tmp_path, ["until"])
    answers = {response for sample in found["samples"]["until"] for [response] in sample["resps"]}
    assert any(answer.endswith(tokenizer.decode([second])) for answer in answers)


def compare(ours, theirs, tmp_path, names=tuple(TASKS)):
    """The same tasks with two models, sample by sample; what was found."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents())))
    for name in names:
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\ntest_split: test\n"
        )
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{data}{TASKS[name]}")
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found, expected = (
        lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=tasks, bootstrap_iters=0)
        for model in (ours, theirs)
    )
    for name in names:
        for a, b in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert a["doc"] == b["doc"]
            if name == "until":
                assert a["resps"] == b["resps"]
            else:  # log-probabilities, and whether they are those of the likeliest tokens
                np.testing.assert_allclose(
                    np.array(a["resps"], np.float64), np.array(b["resps"], np.float64), rtol=1e-5, atol=1e-5
                )
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                np.testing.assert_allclose(found["results"][name][metric], value, rtol=1e-5, err_msg=metric)
    assert len({response for sample in found["samples"]["until"] for [response] in sample["resps"]}) > 3
    return found


def test_bad_arguments_are_named(directory):
    from zamba2_jax.evaluate.harness import Harness

    model, tokenizer = load_hf(directory), load_tokenizer(directory)
    with pytest.raises(ValueError, match="tokenizer=None: expected one with an eos_token"):
        Harness(model)
    with pytest.raises(ValueError, match="batch_size='auto': expected a number"):
        Harness(model, tokenizer, batch_size="auto")
    for options, message in (
        ({"max_gen_toks": 64}, "max_gen_toks=64: expected fewer than max_length, 64"),
        ({"max_gen_toks": 8, "num_beams": 4}, "generation option 'num_beams' is unknown"),
        ({"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top_p=2.0: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            Harness(model, tokenizer, max_length=64).generate_until([SimpleNamespace(args=("the cat", options))])
