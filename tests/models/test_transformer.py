"""Dense transformers: their checkpoints, and what must not change what they say; parity is in `tests/parity`."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from rich.console import Console

from tests.helpers import as_dtype, assert_close, forward, pad_rows, random_model, random_tokens
from tests.train import runs
from zamba2_jax import (
    Backend,
    cache_bytes,
    capture,
    decode_step,
    generate,
    load_hf,
    next_token_loss,
    prefill,
    preset,
    presets,
    read_config,
    save_hf,
    score,
    tap_names,
)
from zamba2_jax.cli.main import main
from zamba2_jax.inference.engine import Engine, Request
from zamba2_jax.models.flops import forward_flops
from zamba2_jax.models.layers import LayerOptions
from zamba2_jax.models.registry import config_json, family_of
from zamba2_jax.models.transformer.config import LlamaConfig, MistralConfig
from zamba2_jax.nn.cache import NO_LIMIT
from zamba2_jax.nn.config import RopeScaling
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.export import export
from zamba2_jax.train.run import run

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = dataclasses.replace(preset("transformer-tiny"), num_layers=2, vocab_size=32)
SIZES = dataclasses.asdict(TINY) | {"rope_scaling": None}
WINDOW = MistralConfig(**SIZES | {"sliding_window": 4})
VARIANTS = {
    "llama": TINY,
    # Of the frequencies of five pairs, 1 to 0.0016, one is kept, one is mixed and three are divided.
    "llama, scaled, biased, tied": dataclasses.replace(
        TINY,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40
        ),
        rope_theta=5e3,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        rms_norm_eps=0.1,
    ),
    "mistral, window": WINDOW,
}
T = 9


def in_transformers(directory, dtype):
    """The checkpoint as transformers loads it; every tensor is found, and no other."""
    kind = transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_is_loaded_and_written_again_byte_for_byte(tmp_path, variant):
    """In float32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config_json(VARIANTS[variant]))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():  # at the beginning biases are 0, scales 1, and all is small
            parameter += torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    assert model.config == VARIANTS[variant]
    tokens = random_tokens(model.config, 2, T)
    expected = theirs(torch.tensor(np.array(tokens)).long()).logits.detach().numpy()
    assert np.linalg.norm(forward(model, tokens) - expected) < 2e-6 * np.linalg.norm(expected)
    assert_close(forward(model, tokens), expected, 2e-6)
    save_hf(model, tmp_path / "ours")
    before, after = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_it_writes_what_transformers_writes(tmp_path):
    """Rows beyond the window, in an engine whose rows are longer than it, and with a prefix."""
    model = random_model(WINDOW)
    save_hf(model, tmp_path / "model")
    theirs = in_transformers(tmp_path / "model", torch.float32)
    prompts = [random_tokens(WINDOW, length, seed=length).tolist() for length in (7, 2)]
    expected = []
    for prompt in prompts:
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        expected.append(made[0, len(prompt) :].tolist())
    assert generate(model, prompts, 8) == expected

    engine = Engine(model, slots=1, capacity=16, chunk=3)
    engine.submit(Request(prompts[0][6:], 8, prefix=engine.prefix(prompts[0][:6])))
    *_, done = engine.events()
    assert list(done.tokens) == expected[0]

    row = prompts[0] + expected[0]
    log_p = jax.nn.log_softmax(forward(model, jnp.array([row])))[0, jnp.arange(len(row) - 1), jnp.array(row[1:])]
    assert_close(score(model, [row], chunk=5)[0], log_p, 1e-5)


@pytest.mark.parametrize("config", [TINY, WINDOW], ids=["llama", "window"])
def test_prefill_at_every_split_then_steps_or_more_prefill(x64, config):
    """Row i takes i + 1 tokens at first, padded; then the rest at once, and, in another branch, one by one."""
    model, row, capacity = random_model(config, jnp.float64), random_tokens(config, T), T + 1
    full, lengths = forward(model, row[None])[0], jnp.arange(1, T)
    first, cache = prefill(model, jnp.stack([row] * (T - 1)), lengths, capacity=capacity)
    assert cache.capacity == (capacity if config is TINY else NO_LIMIT)
    assert cache.layers[0].k.shape[2] == (capacity if config is TINY else 4)
    assert_close(first, full[:-1], 1e-12)
    rest = jnp.stack([jnp.roll(row, -int(length)) for length in lengths])
    logits, _ = prefill(model, rest, T - lengths, cache)
    assert_close(logits, jnp.stack([full[-1]] * (T - 1)), 1e-12)
    for taken in range(1, T):
        logits, cache = decode_step(model, rest[:, taken - 1], cache)
        assert_close(logits[: T - taken], full[taken:], 1e-12)


@pytest.mark.parametrize("config", [TINY, WINDOW], ids=["llama", "window"])
def test_padded_and_packed_rows_are_the_documents_alone(x64, config):
    model = random_model(config, jnp.float64)
    a, b = np.split(np.asarray(random_tokens(config, 12)), [7])
    tokens, ids = pad_rows([a, a, a, b], 14, lead=[0, 7, 3, 0])
    tokens, ids = tokens.at[0, 8:13].set(b), ids.at[0, 8:13].set(2)
    logits, seen, _ = jax.jit(partial(capture, select=("layers.1.attention.k",)))(model, tokens, segment_ids=ids)
    for padded in (logits[1, 7:], logits[2, 3:10]):
        assert_close(padded, logits[0, :7], 1e-12)
    assert_close(logits[0, 8:13], logits[3, :5], 1e-12)
    keys = seen["layers.1.attention.k"]
    assert_close((keys[1, 7:], keys[0, 8:13]), (keys[0, :7], keys[3, :5]), 1e-12)
    plain = forward(model, tokens, ids, backend=Backend.reference())
    assert_close(*(jnp.where(ids[..., None] != 0, of, 0) for of in (plain, logits)), 1e-12)
    assert_close(forward(model, a[None])[0], logits[0, :7], 1e-12)


def test_a_row_sees_no_further_back_than_its_windows():
    """Of two layers: what is 2 (w - 1) tokens before reaches a token, what is one more before does not."""
    model, tokens = random_model(WINDOW), random_tokens(WINDOW, 1, 10)
    before, after = forward(model, tokens), forward(model, tokens.at[:, 1].add(1) % WINDOW.vocab_size)
    changed = np.abs(before - after)[0].max(axis=-1) > 0
    assert changed.tolist() == [False] + [True] * 7 + [False] * 2


def gradient(config, tokens, ids, **options):
    def loss(model):
        h = model.run(tokens, ids, options=LayerOptions(training=True, **options)).h
        return jnp.sum(jnp.where(ids[..., None] != 0, jnp.sin(h), 0))

    return jax.jit(jax.value_and_grad(loss))(random_model(config, jnp.float64))


def test_training_runs_the_same_layers(x64):
    config = dataclasses.replace(WINDOW, num_layers=3)
    tokens, ids = random_tokens(config, 2, 6), jnp.array([[1] * 6, [1, 1, 2, 2, 2, 0]])
    expected = gradient(config, tokens, ids)
    for options in ({"remat": "matmuls"}, {"remat": "layer", "scan": True}, {"remat": "matmuls", "scan": True}):
        assert_close(gradient(config, tokens, ids, **options), expected, 1e-12, str(options))


def test_what_is_kept_of_a_layer_are_its_sums():
    """After the rotation, and after biases and rounding."""
    config = dataclasses.replace(VARIANTS["llama, scaled, biased, tied"], tie_embeddings=False)
    tokens = random_tokens(config, 2, 7)

    def kept(model):
        options = LayerOptions(remat="matmuls", dtype=jnp.bfloat16, training=True)
        return jax.vjp(lambda model: model.run(tokens, options=options).h, model)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, random_model(config)))
    shapes = [(leaf.shape[2:], leaf.dtype.name) for leaf in leaves if leaf.shape[:2] == tokens.shape]
    counts = {shape: shapes.count(shape) for shape in set(shapes)}
    p, layers = config.attention_head_dim, config.num_layers
    assert counts[(config.attention_heads, p), "bfloat16"] == layers  # q
    assert counts[(config.kv_heads, p), "bfloat16"] == 2 * layers  # k, v
    assert counts[(config.ffn_size,), "bfloat16"] == 2 * layers  # gate, up
    assert not any(shape in ((config.ffn_size,), (config.kv_size,)) and kind == "float32" for shape, kind in counts)


def test_on_a_mesh_it_is_that_of_one_device(x64):
    """fsdp, tensor and sequence at once; and a prompt and a step with the ring divided by heads."""
    model = random_model(WINDOW, jnp.float64)
    tokens, ids = random_tokens(WINDOW, 2, 12), jnp.array([[1] * 12, [1] * 3 + [2] * 8 + [0]])
    loss = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, tokens, ids)[0]))
    expected, mesh = loss(model), make_mesh(fsdp=2, tensor=2, sequence=2)
    _, cache = prefill(model, tokens[:, :6], capacity=16)
    stepped, _ = decode_step(model, tokens[:, 6], cache)
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        assert_close(loss(sharded), expected, 1e-12)
        _, cache = prefill(sharded, tokens[:, :6], capacity=16)
        assert_close(decode_step(sharded, tokens[:, 6], cache)[0], stepped, 1e-12)


def test_it_trains_and_what_it_has_learnt_is_exported(tmp_path):
    changes = {
        "model": {"architecture": {"model_type": "mistral", **SIZES, "sliding_window": 5, "vocab_size": 320}},
        "phases": [{"name": "all", "steps": 12, "shares": {"a": 1.0}}],
        "logging": {"every": 1, "tensorboard": False, "health_every": 4},
        "step": {"scan_layers": True, "remat": "matmuls", "microbatches": 2},
    }
    del changes["model"]["architecture"]["rope_scaling"]
    assert run(runs.config(tmp_path, **changes), Console(quiet=True))
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    export(tmp_path / "run", tmp_path / "model")
    assert load_hf(tmp_path / "model").config == dataclasses.replace(
        WINDOW, sliding_window=5, vocab_size=320, pad_token_id=0
    )


def test_its_taps_are_seen_and_edited():
    model, tokens = random_model(TINY), random_tokens(TINY, 1, 6)
    blocks = {"attention": ("input", "q", "k", "v", "output"), "mlp": ("input", "gate", "up", "inner", "output")}
    names = {f"layers.1.{block}.{name}" for block, each in blocks.items() for name in each}
    assert {name for name in tap_names(model) if name.startswith("layers.1")} == {
        *names,
        "layers.1.input",
        "layers.1.output",
    }
    edits = {f"layers.1.{block}.output": jnp.zeros_like for block in blocks}
    _, values, _ = capture(model, tokens, select=("layers.1.?*put",), edits=edits)
    np.testing.assert_array_equal(values["layers.1.input"], values["layers.1.output"])


def test_bfloat16_is_near_float32():
    model, tokens = random_model(WINDOW, jnp.bfloat16), random_tokens(WINDOW, 2, 8)
    expected = forward(as_dtype(model, jnp.float32), tokens)
    assert_close(forward(model, tokens), expected, 0.06)
    cache = prefill(model, tokens[:, :6], capacity=16)[1]
    assert_close(prefill(model, tokens[:, 6:], cache=cache)[0], expected[:, -1], 0.06)


@pytest.mark.parametrize("window", [None, 8])
def test_the_count_is_that_of_the_compiler(unchecked, window):
    # 32 tokens are one block of attention, which with a window is computed whole.
    sizes = {"hidden_size": 192, "head_dim": 40, "ffn_size": 320, "vocab_size": 512}
    config, b, t = MistralConfig(**SIZES | sizes), 3, 32
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    compiled = jax.jit(lambda model, tokens: model(tokens)).lower(random_model(config), tokens).compile()
    assert compiled.cost_analysis()["flops"] / (b * t) == pytest.approx(forward_flops(config, t).total, rel=0.03)
    in_window = dataclasses.replace(config, sliding_window=window)
    less = 0 if window is None else 2 * 4 * config.attention_size * (t - window)
    assert forward_flops(in_window, t).total == forward_flops(config, t).total - less


# Billions of parameters, and bytes of keys and values per token in bfloat16.
PUBLISHED = {
    "llama-3-8b": (8.030, 131072),
    "llama-3.2-1b": (1.236, 32768),
    "mistral-7b-v0.1": (7.242, 131072),
    "mistral-7b-v0.3": (7.248, 131072),
    "phi-3-mini-shape": (3.821, 393216),
    "gemma-7b-shape": (8.538, 458752),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    config = preset(name)
    parameters = sum(np.prod(tensor.shape) for tensor in family_of(config).tensors(config))
    assert (round(parameters / 1e9, 3), cache_bytes(config, 1, 1, jnp.bfloat16).per_token) == PUBLISHED[name]


def test_a_window_bounds_what_a_cache_takes():
    size = cache_bytes(preset("mistral-7b-v0.1"), 1, 32768, jnp.bfloat16)
    assert size.total == size.constant + 4096 * size.per_token


OWN = [name for name, config in presets().items() if isinstance(config, LlamaConfig | MistralConfig)]


@pytest.mark.parametrize("name", OWN)
def test_a_config_is_read_as_transformers_reads_it(name):
    """And what transformers writes is the config again."""
    config = preset(name)
    theirs = transformers.AutoConfig.for_model(**config_json(config))
    assert type(theirs).__name__ == type(config).__name__
    assert read_config(theirs.to_dict()) == config
    fields = {"hidden_size": "hidden_size", "intermediate_size": "ffn_size", "num_key_value_heads": "kv_heads"}
    assert {key: getattr(theirs, key) for key in fields} == {k: getattr(config, of) for k, of in fields.items()}


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_what_a_file_leaves_out_is_as_in_transformers(model_type):
    least = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 8}
    theirs = transformers.AutoConfig.for_model(model_type, **least)
    assert read_config({"model_type": model_type, **least}) == read_config(theirs.to_dict())


def test_files_of_transformers_4_are_read():
    now = config_json(preset("llama-3.2-1b"))
    rope = now.pop("rope_parameters")
    then = now | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "pretraining_tp": 1}
    assert read_config(then) == preset("llama-3.2-1b")
    assert read_config(then | {"rope_scaling": rope | {"type": "llama3"}}) == preset("llama-3.2-1b")


LLAMA, MISTRAL = config_json(TINY), config_json(WINDOW)
SCALED = config_json(preset("llama-3.2-1b"))["rope_parameters"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn': expected 'default' or"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "'default' are {'factor': 4.0}: expect"),
        (
            LLAMA | {"rope_parameters": SCALED | {"low_freq_factor": 4.0}},
            "low_freq_factor=4.0: expected less than high",
        ),
        (LLAMA | {"rope_parameters": SCALED | {"factor": 0}}, "factor=0: expected a finite number > 0"),
        (LLAMA | {"rope_theta": 1.0}, "rope_theta=1.0 and rope_parameters.rope_theta=10000.0 disagree"),
        (LLAMA | {"sliding_window": 4}, "sliding_window=4: expected None in a llama model"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window=0: expected an integer >= 1"),
        (MISTRAL | {"attention_bias": True}, "attention_bias=True: expected false in a mistral model"),
        (
            LLAMA | {"hidden_act": "gelu"},
            "'hidden_act' has a value this model does not support, 'gelu', expected 'silu'",
        ),
        (LLAMA | {"num_key_value_heads": 4}, "kv_heads=4: expected a divisor of attention_heads = 6"),
        (LLAMA | {"head_dim": 5}, "head_dim=5: expected an even number"),
        (LLAMA | {"hidden_size": 25}, "attention_heads=6: expected a divisor of hidden_size = 25"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' has a value"),
        (LLAMA | {"qk_norm": True}, "keys \\['qk_norm'\\] are unknown and could change what the model computes"),
        ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "config has no 'intermediate_size'"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"rope_scaling=.*: expected a table of factor, low_freq_factor"):
        preset("transformer-tiny", rope_scaling={"factor": 2.0})
    assert preset("llama-3.2-1b", rope_scaling=dataclasses.asdict(preset("llama-3.2-1b").rope_scaling)) == preset(
        "llama-3.2-1b"
    )
    with pytest.raises(ValueError, match=r"time_step_min=0.1: expected None, a llama model has no such number"):
        save_hf(random_model(TINY), tmp_path / "model", time_step_min=0.1)


def test_it_is_planned(capsys):
    words = ["plan", "--preset", "transformer-tiny", "--topology", "cpu:2", "--batch", "2", "--seq", "8"]
    assert main(words) == 0
    assert "tokens/s" in capsys.readouterr().out
