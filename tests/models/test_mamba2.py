"""Mamba2 as a language model of its own, through all that a family has to do; parity is in `tests/parity`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from tests.helpers import abstract_model, assert_close, forward, pad_rows, random_model, random_tokens
from tests.models import proofs
from tests.models.pytorch import in_pytorch, logits_of, relative, torch, transformers
from tests.train import runs
from zamba2_jax import (
    Sampling,
    cache_bytes,
    capture,
    decode_step,
    generate,
    load_hf,
    prefill,
    preset,
    save_hf,
    score,
)
from zamba2_jax.cli.main import main
from zamba2_jax.data.batches import Batch
from zamba2_jax.evaluate import necessity
from zamba2_jax.models.flops import forward_flops
from zamba2_jax.models.mamba2.weights import tensors
from zamba2_jax.nn.cache import NO_LIMIT
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.train.export import export
from zamba2_jax.train.run import run

TINY = preset("mamba2-tiny")
OTHER = dataclasses.replace(
    TINY,
    num_layers=2,
    ngroups=1,
    expand=3,
    d_conv=3,
    rms_norm_eps=0.1,
    add_bias_linear=True,
    use_conv_bias=False,
    tie_embeddings=False,
    time_step_limit=(0.05, 0.3),
    residual_in_fp32=False,
)
VARIANTS = {"tiny": TINY, "biases, untied, clamped dt, other sizes": OTHER}
SMALL = dataclasses.replace(TINY, num_layers=2, vocab_size=32)


def test_a_clamped_pass_is_that_of_pytorch_in_value_and_gradient(x64, torch_in_float64, tmp_path):
    """Which parity leaves out, as a cached step of transformers does not clamp.

    Padding stands after the row: before it, biases of the in projections leak out of it in transformers.
    """
    model = random_model(OTHER, jnp.float64)
    theirs = in_pytorch(model, tmp_path / "model", "float64")
    tokens, segment_ids = pad_rows(np.split(np.asarray(random_tokens(OTHER, 34)), [21]), 21)
    real = np.asarray(segment_ids) != 0
    weights = np.random.default_rng(3).standard_normal((*tokens.shape, model.config.vocab_size)) * real[..., None]
    expected = logits_of(theirs, tokens, segment_ids)
    (expected * torch.from_numpy(weights)).sum().backward()

    def summed(model):
        logits = model(tokens, segment_ids)
        return jnp.sum(logits * weights), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(model)
    assert relative(logits[real], expected.detach()[real]) < 1e-12
    found, parameters = named_parameters(gradient), dict(theirs.named_parameters())
    for tensor in tensors(model.config):
        for path, part in tensor.split(parameters[tensor.name].grad.numpy()).items():
            assert relative(found.pop(path)[...], part) < 1e-11, path
    assert not found


def test_the_stream_is_float32_under_bfloat16_where_the_config_says_so(tmp_path):
    exact, tokens = random_model(SMALL), random_tokens(SMALL, 2, 17)
    theirs = in_pytorch(exact, tmp_path / "model", "bfloat16")
    model = load_hf(tmp_path / "model", dtype=jnp.bfloat16)
    names = ("layers.1.input", "layers.1.mamba.input", "final_norm")
    seen = capture(model, tokens, select=names)
    assert [seen.values[name].dtype for name in names] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    with torch.no_grad():
        errors = [relative(logits, forward(exact, tokens)) for logits in (seen.logits, logits_of(theirs, tokens))]
    assert errors[0] < 1.1 * errors[1]
    _, cache = prefill(model, tokens[:, :-1])
    assert relative(decode_step(model, tokens[:, -1], cache)[0], seen.logits[:, -1]) < 0.02
    narrow = abstract_model(dataclasses.replace(SMALL, residual_in_fp32=False), jnp.bfloat16)
    shapes = jax.eval_shape(lambda model: capture(model, tokens, select=names).values, narrow)
    assert {shapes[name].dtype for name in names} == {jnp.dtype(jnp.bfloat16)}


def test_checkpoints_of_transformers_are_read_and_written_as_they_are(tmp_path):
    for tied in (True, False):
        content = {"hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "n_groups": 3}
        hf = transformers.Mamba2Config(**content, vocab_size=97, tie_word_embeddings=tied, bos_token_id=1)
        theirs = transformers.Mamba2ForCausalLM(hf)
        theirs.save_pretrained(tmp_path / f"theirs-{tied}")
        model = load_hf(tmp_path / f"theirs-{tied}")
        save_hf(model, tmp_path / f"ours-{tied}")
        before, after = (load_file(tmp_path / f"{side}-{tied}" / "model.safetensors") for side in ("theirs", "ours"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        tokens = random_tokens(model.config, 1, 9)
        with torch.no_grad():
            assert relative(forward(model, tokens), logits_of(theirs, tokens)) < 2e-5


def test_names_of_the_backbone_alone_and_of_mamba_ssm_are_known(tmp_path):
    model = random_model(TINY)
    save_hf(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    arrays = load_file(file)
    names = [
        lambda name: name.removeprefix("backbone."),  # as `Mamba2Model` saves itself
        lambda name: name.replace("embeddings.", "embedding."),
        lambda name: f"module.{name}",
    ]
    for rename in names:
        save_file({rename(name): array for name, array in arrays.items()}, file)
        assert_close(load_hf(tmp_path / "model"), model, 0)
    save_file({name: array for name, array in arrays.items() if not name.endswith("1.mixer.D")}, file)
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.mixer\.D: missing"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_holds_every_parameter_once(name):
    proofs.the_table_holds_every_parameter_once(VARIANTS[name])


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_a_pass_is_a_prefill_and_steps(x64, config):
    model = random_model(config, jnp.float64)
    tokens = random_tokens(config, 2, 11)
    full = forward(model, tokens)
    assert cache_bytes(config, 2, 100).per_token == 0
    step = jax.jit(decode_step)
    logits, cache = prefill(model, tokens[:, :4])
    assert cache.capacity == NO_LIMIT
    assert_close(logits, full[:, 3], 1e-12)
    for i in range(4, 11):
        logits, cache = step(model, tokens[:, i], cache)
        assert_close(logits, full[:, i], 1e-12)


def test_documents_stay_apart(x64):
    proofs.documents_stay_apart(SMALL)


def test_it_writes_and_scores():
    model = random_model(SMALL)
    row = random_tokens(SMALL, 10).tolist()
    sampling = Sampling(temperature=0.7, top_k=5, seed=3)
    together = generate(model, [row, row[:3], row[:7]], 6, sampling, stop_tokens=())
    assert together[1] == generate(model, [row[:3]], 6, sampling, stop_tokens=())[0]
    log_p = jax.nn.log_softmax(forward(model, jnp.array([row]))[0, :-1])[jnp.arange(9), jnp.array(row[1:])]
    assert_close(score(model, [row])[0], log_p, 1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2, "sequence": 2}], ids=str)
def test_scans_and_meshes_train_by_the_gradient_of_the_plain_pass(x64, sizes):
    proofs.a_scan_on_a_mesh_trains_by_the_gradient_of_the_plain_pass(SMALL, sizes)


def test_what_its_layers_are_worth_is_measured():
    model, tokens = random_model(SMALL), np.asarray(random_tokens(SMALL, 3, 12))
    found = necessity(model, [Batch(tokens=tokens, segment_ids=np.ones_like(tokens))])
    names = [f"layers.{i}.{kind}" for i in range(2) for kind in ("mixer", "layer")]
    assert [of.part.name for of in found.silenced] == [*names, "all.mixer"]
    assert abs(found["layers.1.layer"].increase) > 1e-3
    assert found.table().row_count == 3


def test_it_trains_and_what_it_has_learnt_is_exported(tmp_path):
    architecture = {"model_type": "mamba2", "hidden_size": 16, "num_layers": 2, "mamba_heads": 4, "d_state": 6}
    changes = {
        "model": {"architecture": architecture | {"vocab_size": 320}},
        "phases": [{"name": "all", "steps": 12, "shares": {"a": 1.0}}],
        "logging": {"every": 1, "tensorboard": False, "health_every": 4},
        "step": {"scan_layers": True, "remat": "layer", "microbatches": 2},
    }
    assert run(runs.config(tmp_path, **changes), Console(quiet=True))
    records = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    export(tmp_path / "run", tmp_path / "model")
    assert load_hf(tmp_path / "model").config.model_type == "mamba2"
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = random_tokens(theirs.config, 1, 12)
    with torch.no_grad():
        assert relative(forward(load_hf(tmp_path / "model"), tokens), logits_of(theirs, tokens)) < 2e-5


def test_it_is_planned(capsys):
    words = ["plan", "--preset", "mamba2-tiny", "--topology", "cpu:2", "--batch", "2", "--seq", "8"]
    assert main([*words, "--mesh", "fsdp=2"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_flops_are_those_of_the_compiler(unchecked):
    # One chunk of the scan, so that there are no loops, whose bodies the compiler would count once.
    config, b, t = dataclasses.replace(SMALL, hidden_size=192, d_state=40, vocab_size=512), 3, 32
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    compiled = jax.jit(lambda model, tokens: model(tokens)).lower(abstract_model(config), tokens).compile()
    assert "while(" not in compiled.as_text()
    assert compiled.cost_analysis()["flops"] / (b * t) == pytest.approx(forward_flops(config, t).total, rel=0.03)
