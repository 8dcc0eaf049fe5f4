"""Zamba1: against PyTorch, and through all that a family has to do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file, save_file

from tests.helpers import assert_close, forward, pad_rows, random_model, random_tokens
from tests.models import proofs
from tests.models.pytorch import in_pytorch, logits_of, relative, torch, transformers
from tests.train import runs
from zamba2_jax import (
    Backend,
    cache_bytes,
    capture,
    count_flops,
    decode_step,
    generate,
    init_model,
    load_hf,
    prefill,
    preset,
    save_hf,
    score,
)
from zamba2_jax.cli.main import main
from zamba2_jax.models.zamba1.weights import tensors
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.export import export
from zamba2_jax.train.run import run

TINY = preset("zamba1-tiny")
OTHER = dataclasses.replace(
    TINY,
    num_layers=3,
    hybrid_layer_ids=(0, 2),
    mamba_heads=2,
    kv_heads=2,
    dt_rank=None,
    expand=3,
    d_conv=3,
    rms_norm_eps=0.1,
    use_proj_bias=True,
    use_conv_bias=False,
    tie_embeddings=False,
)
VARIANTS = {
    "three heads": dataclasses.replace(TINY, num_layers=3, hybrid_layer_ids=(1, 2)),
    "biases, untied, other sizes": OTHER,
}
SMALL = dataclasses.replace(TINY, num_layers=3, hybrid_layer_ids=(0, 2), vocab_size=32)


def batch_of(config):
    """A row of 21 tokens, and one with padding: before it, or after it where transformers lets biases leak out of it.

    That is where in projections have biases: these stand in the padding that the convolution then reads.
    """
    tokens = 1 + random_tokens(config, 34) % (config.vocab_size - 1)  # PyTorch gives the padding token no gradient
    rows = np.split(np.asarray(tokens), [21])
    return pad_rows(rows, 21, lead=[0, 0 if config.use_proj_bias else 8])


@pytest.mark.parametrize("name", VARIANTS)
def test_computes_what_pytorch_does(tmp_path, name):
    model = random_model(VARIANTS[name])
    tokens, segment_ids = batch_of(model.config)
    with torch.no_grad():
        expected = logits_of(in_pytorch(model, tmp_path / "model"), tokens, segment_ids)
    real = np.asarray(segment_ids) != 0
    assert relative(forward(model, tokens, segment_ids)[real], expected[real]) < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_in_float64_nothing_is_left_of_the_difference_nor_of_gradients(x64, torch_in_float64, tmp_path, name):
    model = random_model(VARIANTS[name], jnp.float64)
    theirs = in_pytorch(model, tmp_path / "model", "float64")
    tokens, segment_ids = batch_of(model.config)
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
        if model.config.tie_embeddings:
            of_calls = parameters[tensor.name].grad
        else:  # there every call has a copy of the block
            of_calls = sum(parameters[name].grad for name in (tensor.name, *tensor.copies))
        for path, part in tensor.split(of_calls.numpy()).items():
            assert relative(found.pop(path)[...], part) < 1e-11, path
    assert not found


def test_states_and_continuations_are_those_of_pytorch(tmp_path):
    model = random_model(SMALL)
    theirs = in_pytorch(model, tmp_path / "model")
    tokens = random_tokens(SMALL, 1, 9)
    prompt = torch.tensor(np.asarray(tokens)).long()
    with torch.no_grad():
        cache_of_theirs = theirs(prompt, use_cache=True).past_key_values
        continued = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    _, cache = prefill(model, tokens)
    for i, state in enumerate(cache.layers):
        past = cache_of_theirs.get_conv_state(i, state_idx=0)[..., 1 - SMALL.d_conv :]
        assert relative(state.conv_x.swapaxes(1, 2), past) < 1e-5
        recurrent = cache_of_theirs.get_recurrent_state(i, state_idx=0)
        assert relative(state.ssm.reshape(recurrent.shape), recurrent) < 1e-5
    assert generate(model, tokens.tolist(), 12, stop_tokens=()) == continued[:, 9:].tolist()


def test_checkpoints_of_transformers_are_read_and_written_as_they_are(tmp_path):
    for tied in (True, False):
        sizes = {"hidden_size": 24, "num_hidden_layers": 5, "intermediate_size": 40, "mamba_dt_rank": 5}
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "n_mamba_heads": 3}
        hf = transformers.ZambaConfig(**sizes, **heads, vocab_size=97, tie_word_embeddings=tied)
        theirs = transformers.ZambaForCausalLM(hf)
        if not tied:  # transformers ties the block at its layers only where it ties the head, too
            first, later = (theirs.model.layers[layer].shared_transf for layer in (2, 4))
            later.load_state_dict(first.state_dict())
        theirs.save_pretrained(tmp_path / f"theirs-{tied}")
        model = load_hf(tmp_path / f"theirs-{tied}")
        assert model.config.hybrid_layer_ids == (2, 4)
        save_hf(model, tmp_path / f"ours-{tied}")
        before, after = (load_file(tmp_path / f"{side}-{tied}" / "model.safetensors") for side in ("theirs", "ours"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_slices_for_a_mesh_are_read_from_alternating_rows_and_heads(tmp_path):
    model = random_model(dataclasses.replace(TINY, vocab_size=96, use_proj_bias=True))
    save_hf(model, tmp_path / "model")
    mesh = make_mesh(fsdp=2, tensor=4)
    placed = load_hf(tmp_path / "model", mesh=mesh)
    assert_close(jax.device_get(placed), jax.device_get(model), 0)
    assert placed.layers[0].mamba.A_log[...].addressable_shards[0].data.shape == (48 * 10 // 4,)
    file = tmp_path / "model" / "model.safetensors"
    arrays = load_file(file)
    arrays["model.layers.0.mamba.in_proj.weight"][3, 1] = np.nan
    arrays["model.layers.2.mamba.dt_proj_weight"][2, 1, 1] = np.inf
    save_file(arrays, file)
    with pytest.raises(ValueError, match=r"(?s)0\.mamba\.in_proj\.weight: not finite in rows 1 to 95.*dt_proj_weight"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_holds_every_parameter_once(name):
    proofs.the_table_holds_every_parameter_once(VARIANTS[name])


def test_it_begins_as_transformers_does():
    mamba = init_model(TINY, rngs=nnx.Rngs(0)).layers[0].mamba
    assert_close(mamba.A_log[...].reshape(-1, 10), np.tile(np.log(np.arange(1, 11)), (48, 1)), 1e-7)
    dt = np.asarray(jax.nn.softplus(mamba.dt_bias[...]))
    assert TINY.time_step_min * 0.99 < dt.min() < 0.005 < 0.03 < dt.max() < TINY.time_step_max * 1.01
    bound = np.max(np.abs(mamba.dt_proj[...])) * TINY.time_step_rank**0.5
    assert 0.95 < bound <= 1.0
    assert float(mamba.x_proj[...].std()) == pytest.approx(TINY.initializer_range, rel=0.1)
    assert_close(mamba.D[...], np.ones(48), 0)


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_a_pass_is_a_prefill_in_pieces_and_steps(x64, config):
    model = random_model(config, jnp.float64)
    tokens = random_tokens(config, 2, 11)
    full = forward(model, tokens)
    assert cache_bytes(config, 2, 100).per_token == 2 * 2 * config.num_calls * config.kv_size * 4
    step = jax.jit(decode_step)
    _, cache = prefill(model, tokens[:, :3], capacity=11)
    logits, cache = prefill(model, tokens[:, 3:7], cache=cache)
    assert_close(logits, full[:, 6], 1e-12)
    for i in range(7, 11):
        logits, cache = step(model, tokens[:, i], cache)
        assert_close(logits, full[:, i], 1e-12)


def test_documents_stay_apart(x64):
    proofs.documents_stay_apart(SMALL)


def test_it_writes_and_scores():
    model = random_model(SMALL)
    row = random_tokens(SMALL, 10).tolist()
    together = generate(model, [row, row[:3], row[:7]], 6, stop_tokens=())
    assert together[1] == generate(model, [row[:3]], 6, stop_tokens=())[0]
    log_p = jax.nn.log_softmax(forward(model, jnp.array([row]))[0, :-1])[jnp.arange(9), jnp.array(row[1:])]
    assert_close(score(model, [row])[0], log_p, 1e-5)


def test_taps_see_the_mixer_and_the_reference_backend_has_every_derivative(x64):
    model, tokens = random_model(SMALL, jnp.float64), random_tokens(SMALL, 2, 7)
    names = ["z", "x", "dt", "B", "C", "y", "output", "conv_x_state", "ssm_state"]
    seen = capture(model, tokens, select=tuple(f"layers.1.mamba.{name}" for name in names))
    h, p, n = SMALL.mamba_heads, SMALL.mamba_head_dim, SMALL.d_state
    expected = [(2, 7, h * p)] * 3 + [(2, 7, h, n)] * 2 + [(2, 7, h * p), (2, 7, 24), (2, 3, h * p), (2, h, p, n)]
    assert [seen.values[f"layers.1.mamba.{name}"].shape for name in names] == expected

    embedded, direction = model.embed[...][tokens], random_model(SMALL, jnp.float64, seed=1).embed[...][tokens]

    def gradient(embedded, backend):
        return jax.grad(lambda e: jnp.sum(jnp.sin(model(inputs_embeds=e, backend=backend))))(embedded)

    plain = Backend.reference()
    value, found = jax.jit(lambda: jax.jvp(lambda e: gradient(e, plain), (embedded,), (direction,)))()
    chunked = jax.jit(lambda e: gradient(e, None))
    assert_close(chunked(embedded), value, 1e-11)
    sides = [chunked(embedded + sign * 1e-5 * direction) for sign in (1, -1)]
    assert_close(found, (sides[0] - sides[1]) / 2e-5, 1e-5)


MESHES = [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}, {"data": 2, "tensor": 2, "sequence": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_scans_and_meshes_train_by_the_gradient_of_the_plain_pass(x64, sizes):
    """Of three heads, which no mesh here divides."""
    proofs.a_scan_on_a_mesh_trains_by_the_gradient_of_the_plain_pass(SMALL, sizes)


def test_a_mesh_writes_what_one_device_does(x64):
    config = dataclasses.replace(SMALL, mamba_heads=2)
    model, tokens = random_model(config, jnp.float64), random_tokens(config, 2, 6)
    expected, cache = prefill(model, tokens, capacity=8)
    expected_next, _ = decode_step(model, tokens[:, 0], cache)
    mesh = make_mesh(data=2, tensor=4)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        logits, cache = prefill(sharded, tokens, capacity=8)
        following, _ = jax.jit(decode_step)(sharded, tokens[:, 0], cache)
    assert_close(jax.device_get((logits, following)), jax.device_get((expected, expected_next)), 1e-12)
    with pytest.raises(ValueError, match="does not divide the Mamba channels, 48"):
        shard_model(model, make_mesh(fsdp=5))


def test_vectors_stay_in_float32_and_bfloat16_is_no_worse_than_in_pytorch(tmp_path):
    exact, tokens = random_model(SMALL), random_tokens(SMALL, 2, 17)
    theirs = in_pytorch(exact, tmp_path / "model", "bfloat16")
    model = load_hf(tmp_path / "model", dtype=jnp.bfloat16)
    mamba = model.layers[0].mamba
    assert {mamba.A_log.dtype, mamba.D.dtype, mamba.dt_bias.dtype} == {jnp.dtype(jnp.float32)}
    assert mamba.x_proj.dtype == mamba.dt_proj.dtype == jnp.bfloat16
    expected, logits = forward(exact, tokens), forward(model, tokens)
    with torch.no_grad():
        errors = [relative(found, expected) for found in (logits, logits_of(theirs, tokens).float())]
    assert errors[0] < 1.1 * errors[1]
    _, cache = prefill(model, tokens[:, :-1], capacity=17)
    assert relative(decode_step(model, tokens[:, -1], cache)[0], logits[:, -1]) < 0.03


def test_it_trains_and_what_it_has_learnt_is_exported(tmp_path):
    sizes = {"hidden_size": 16, "num_layers": 3, "hybrid_layer_ids": [1, 2], "mamba_heads": 2, "d_state": 6}
    block = {"attention_heads": 4, "kv_heads": 4, "ffn_size": 24}
    changes = {
        "model": {"architecture": {"model_type": "zamba", **sizes, **block, "vocab_size": 320}},
        "phases": [{"name": "all", "steps": 12, "shares": {"a": 1.0}}],
        "logging": {"every": 1, "tensorboard": False, "health_every": 4},
        "step": {"scan_layers": True, "remat": "layer", "microbatches": 2},
    }
    assert run(runs.config(tmp_path, **changes), Console(quiet=True))
    records = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    export(tmp_path / "run", tmp_path / "model")
    model = load_hf(tmp_path / "model")
    theirs = transformers.ZambaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = random_tokens(model.config, 1, 12)
    with torch.no_grad():
        assert relative(forward(model, tokens), logits_of(theirs, tokens)) < 2e-5


def test_it_is_planned(capsys):
    words = ["plan", "--preset", "zamba1-tiny", "--topology", "cpu:2", "--batch", "2", "--seq", "8"]
    assert main([*words, "--mesh", "fsdp=2"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_flops_of_the_published_model_are_those_counted_by_hand():
    """Two for each parameter that is met at a token, and what is between tokens."""
    config, length = preset("zamba-7b-v1"), 1024
    d, e, f = 3712, 7424, 14848
    mixer = 2 * (d * 2 * e + e * (232 + 32) + 232 * e + e * d) + 2 * 4 * e + 6 * e * 16
    assert count_flops(config, length) == {
        "mixers": 76 * mixer,
        "attention": 13 * (2 * 3 * d * 2 * d + 2 * 2 * d * d + 4 * 2 * d * length),
        "mlp": 13 * 2 * 3 * d * f,
        "linears": 13 * 2 * d * d,
        "embedded_qkv": 2 * 3 * d * 2 * d,
        "head": 2 * d * 32000,
    }
