import dataclasses
import json

import pytest

from tests.helpers import TINY, abstract_model
from zamba2_jax.cli.main import main
from zamba2_jax.models.zamba2.presets import PRESETS
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.plan.chips import describe_slice
from zamba2_jax.plan.estimate import Job
from zamba2_jax.plan.search import candidates
from zamba2_jax.train.step import StepConfig

SMALL = dataclasses.replace(TINY, num_layers=2, hybrid_layer_ids=(1,), num_shared_blocks=1)
STEP = ["plan", "--topology", "cpu:8", "--seq", "12", "--batch", "16", "--preset"]


def test_plans_for_eight_cpu_devices(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)
    path = tmp_path / "plan.json"
    words = ["--mesh", "data=2,fsdp=4", "--microbatches", "2", "--json", str(path)]
    assert main([*STEP, "small", *words]) == 0
    printed = capsys.readouterr().out
    (label, found), *others = json.loads(path.read_text()).items()
    assert not others
    assert label == "data=2,fsdp=4 remat=layer"
    parameters = named_parameters(abstract_model(SMALL)).values()
    divided = sum(p.get_value().size for p in parameters if {"d_model", "attention_in", "adapter_out"} & set(p.axes))
    whole = sum(p.get_value().size for p in parameters) - divided
    assert found["parameters"] == 4 * (divided // 4 + whole)
    assert found["optimizer"] == 2 * found["parameters"] + 4  # and the count of steps
    assert found["temporaries"] > 0
    # Over rings: three of four parts of what is divided are gathered at least once for the forward pass and once for
    # the backward one, and each device sends its part of the gradient to the other row of the mesh.
    sent = found["traffic"][1]
    assert sent["all-gather"] >= 2 * 3 / 4 * 4 * divided
    assert sent["all-reduce"] + sent.get("reduce-scatter", 0) >= found["parameters"]
    assert found["traffic"][3] == 0
    for name in ("temporaries", "all-gather", "bound by", "utilisation"):
        assert name in printed


def test_plans_inference_and_ranks_meshes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(SMALL, vocab_size=96))
    path = tmp_path / "plan.json"
    words = ["plan", "--preset", "small", "--topology", "cpu:2", "--batch", "2", "--seq", "12", "--json", str(path)]
    assert main([*words, "--task", "decode", "--search"]) == 0
    ranked = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert list(found) == ["data=2 decode", "fsdp=2 decode", "tensor=2 decode"]
    assert all(label in ranked for label in found)
    alone, divided = found["data=2 decode"], found["fsdp=2 decode"]
    assert alone["weights"] > divided["weights"]
    assert alone["caches"] == divided["caches"]
    assert main([*words, "--task", "prefill"]) == 0
    printed = capsys.readouterr().out
    for name in ("tensor=2 prefill", "weights", "caches", "bound by", "first token"):
        assert name in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9:2x2"], "topology 'v9:2x2': expected chip:shape"),
        (["--topology", "cpu:16"], "xla_force_host_platform_device_count=16 gives 16"),
        (["--mesh", "fsdp=3"], "expected sizes >= 1 with the product 8, all chips"),
        (["--mesh", "model=8"], "each of data, fsdp, tensor, sequence once at most"),
        (["--mesh", "tensor=8"], "tensor=8 does not divide the Mamba heads, 6"),
        (["--batch", "12"], "does not divide the batch, 12"),
        (["--microbatches", "3"], "--microbatches 3 does not divide --batch 16"),
        (["--json", "nowhere/at/all"], "there is no directory"),
        (["--task", "decode", "--seq", "0"], "--seq 0: expected an integer >= 1"),
        (["--task", "decode", "--remat", "layer"], "--remat layer: expected only with --task train"),
        (["--task", "prefill", "--microbatches", "2"], "--microbatches 2: expected only with --task train"),
        (["--task", "prefill"], "tensor=8 does not divide the Mamba heads, 6"),
        (["--task", "prefill", "--mesh", "sequence=8"], "sequence=8: expected 1 for prefill"),
    ],
)
def test_wrong_options_are_named(capsys, words, message):
    assert main([*STEP, "zamba2-tiny", *words]) == 2
    assert message in capsys.readouterr().err


def test_candidates_divide_the_chips_and_the_model():
    job = Job(config=dataclasses.replace(TINY, vocab_size=96), batch=4, length=12, step=StepConfig())
    found = [(sizes, of.step.remat) for of, sizes in candidates(job, describe_slice("cpu:8"))]
    # Four rows: with tensor=1 the other two chips share a row. The state is small, so it need not be divided.
    meshes = [
        {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 2},
        {"data": 4, "fsdp": 1, "tensor": 1, "sequence": 2},
        {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1},
        {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1},
    ]
    assert found == [(sizes, remat) for sizes in meshes for remat in ("matmuls", "layer")]
