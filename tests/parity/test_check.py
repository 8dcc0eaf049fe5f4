import dataclasses
import json
import math
import os
import subprocess

import numpy as np
import pytest

from tests.helpers import COMMAND
from tests.models.gated_linear_attention import GLAConfig
from zamba2_jax import preset
from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.cli.parity import Parity
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.ops import backend
from zamba2_jax.parity.case import Case
from zamba2_jax.parity.check import check
from zamba2_jax.parity.families import reference_family
from zamba2_jax.parity.ours import random_model
from zamba2_jax.parity.states import MAMBA2
from zamba2_jax.parity.streaming import check_streaming
from zamba2_jax.parity.variants import VARIANTS

SMALL = dataclasses.replace(VARIANTS["7b-miniature"].config, num_layers=2, hybrid_layer_ids=(0, 1))
LENGTH = 21
"""The same for all tests of the small model, so that they share their programs."""
STREAMED = ("mamba2-linear-biases", "mistral-window")


def cut(name, **changes):
    """A variant of two layers, or, where there are calls, of three: a plain one and two with calls."""
    config = VARIANTS[name].config
    layers = {"num_layers": 3, "hybrid_layer_ids": (1, 2)} if config.num_calls else {"num_layers": 2}
    return dataclasses.replace(VARIANTS[name], config=dataclasses.replace(config, **layers), **changes)


def groups(states, *, gradients=True):
    """Kinds of evidence that a report has."""
    return {"embed", "layer", *states, "logits", "loss", "greedy"} | ({"gradient"} if gradients else set())


@pytest.mark.parametrize(
    ("case", "gradients"),
    [
        # Between them those of a family have every kind of parameter and of input.
        pytest.param(cut("linear-biases"), True, id="linear-biases cut"),
        pytest.param(cut("left-padding"), False, id="left-padding cut"),
        pytest.param(cut("mamba2-linear-biases"), True, id="mamba2-linear-biases cut"),
        pytest.param(cut("llama-linear-biases"), True, id="llama-linear-biases cut"),
        pytest.param(cut("mistral-window"), True, id="mistral-window cut"),
        pytest.param(cut("zamba1-miniature"), True, id="zamba1-miniature cut"),
        *(pytest.param(case, True, marks=pytest.mark.slow, id=name) for name, case in VARIANTS.items()),
    ],
)
def test_variant_is_within_the_limits_in_float32(case, gradients):
    report = check(case, new_tokens=12, gradients=gradients)
    assert report.failures == ()
    states = reference_family(case.config).states.names
    assert {row.group for row in report.rows} == groups(states, gradients=gradients)
    for group in ("layer", *states):
        assert sum(row.group == group for row in report.rows) == case.config.num_layers
    if gradients:
        compared = {row.name for row in report.rows if row.group == "gradient"}
        assert compared == {f"gradient.{name}" for name in named_parameters(random_model(case.config, seed=0))}


@pytest.mark.parametrize(
    ("case", "gradients"),
    [
        pytest.param(cut("1.2b-miniature"), False, id="1.2b-miniature cut"),
        *(
            pytest.param(VARIANTS[name], True, marks=pytest.mark.slow, id=name)
            for name in ("1.2b-miniature", "7b-miniature", "mamba2-miniature", "llama-grouped-kv-heads")
        ),
    ],
)
def test_variant_is_within_the_limits_in_bfloat16(case, gradients):
    assert check(case, dtype="bfloat16", new_tokens=2, gradients=gradients).failures == ()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A checkpoint, what the command prints about it, and the rows that it writes: as users run it."""
    directory = tmp_path_factory.mktemp("checked")
    save_hf(random_model(SMALL, seed=0), directory / "model")
    words = f"--model {directory / 'model'} --batch 8 --seq {LENGTH} --new-tokens 2 --json {directory / 'report.json'}"
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["XDG_CACHE_HOME"] = str(directory)
    done = subprocess.run([*COMMAND, "parity", *words.split()], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = json.loads((directory / "report.json").read_text())
    return directory / "model", done.stdout, {row["name"]: row for row in report["rows"]}


def test_the_command_succeeds_on_a_checkpoint_and_prints_every_row(checked):
    _, printed, rows = checked
    for word in ("embed", "layers.1.output", "conv_state", "ssm_state", "logits", "loss"):
        assert word in printed
    assert "gradient.layers.0.mamba.in_z" in printed
    assert "0% differ" in printed
    assert {row["group"] for row in rows.values()} == groups(MAMBA2.names)


def test_streaming_agrees_with_the_whole_model(checked):
    directory, _, whole = checked
    report = check_streaming(Case("streamed", SMALL, seq=LENGTH), directory)
    assert report.failures == ()
    streamed = {row.name: row for row in report.rows}
    for name in ("layers.1.output", "layers.1.ssm_state", "logits", "gradient.norm", "gradient.calls.1.linear"):
        assert streamed[name].size == pytest.approx(whole[name]["size"], rel=1e-6)
    used_twice = {
        "gradient.embed",
        "gradient.head",
        "gradient.calls.0.block.mlp.gate",
        "gradient.calls.1.block.mlp.gate",
    }
    assert used_twice <= set(streamed)


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(cut(name, batch=2, seq=LENGTH), id=f"{name} cut") for name in STREAMED),
        *(
            pytest.param(case, marks=pytest.mark.slow, id=name)
            for name, case in VARIANTS.items()
            if not case.left_padding
        ),
    ],
)
def test_variant_is_within_the_limits_when_it_is_streamed(case):
    report = check_streaming(case)
    assert report.failures == ()
    listed = {f"layers.{i}" for i in range(case.config.num_layers)}
    assert listed <= {row.name.removesuffix(".output") for row in report.rows if row.group == "layer"}


def test_streaming_of_random_weights_without_gradients(checked):
    report = check_streaming(Case("forward", SMALL, seq=LENGTH), gradients=False)
    assert report.failures == ()
    assert {row.group for row in report.rows} == groups(MAMBA2.names, gradients=False)
    (logits,) = (row for row in report.rows if row.group == "logits")
    assert logits.size == pytest.approx(checked[2]["logits"]["size"], rel=1e-6)


def test_a_wrong_model_fails_and_the_command_says_so(checked, monkeypatch, tmp_path, capsys):
    rotate = backend.rotate
    monkeypatch.setattr(backend, "rotate", lambda x, positions, base, **how: rotate(x, positions, base * 1.01, **how))
    out = tmp_path / "report.json"
    options = Parity(model=checked[0], batch=8, seq=LENGTH, new_tokens=2, gradients=False, json=out)
    assert options.run() == 1
    assert "beyond the limits" in capsys.readouterr().out
    (report,) = json.loads(out.read_text())
    assert {row["group"] for row in report["rows"]} == groups(MAMBA2.names, gradients=False)
    assert any("logits" in failure for failure in report["failures"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "zamba2-9b"}, "zamba2-9b.*unknown"),
        ({"variants": (("nope",),)}, "nope.*unknown"),
        ({"preset": "zamba2-1.2b", "seq": 0}, "--seq 0"),
        ({"streaming": True}, "--streaming needs"),
        ({"preset": "zamba2-1.2b", "variants": (("untied-head",),)}, "excludes"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        Parity(**options).run()


@pytest.mark.parametrize("run", [check, check_streaming])
@pytest.mark.parametrize("name", ["zamba2-tiny", "mamba2-tiny"])
def test_a_clamped_time_step_has_no_reference(run, name):
    config = dataclasses.replace(preset(name), time_step_limit=(0.01, math.inf))
    with pytest.raises(ValueError, match="time_step_limit"):
        run(Case("clamped", config))


@pytest.mark.parametrize("run", [check, check_streaming])
def test_a_family_that_transformers_does_not_have_is_refused(run):
    with pytest.raises(
        ValueError, match="parity of model_type 'test-gla': expected one of zamba2, zamba, mamba2, llama"
    ):
        run(Case("foreign", GLAConfig(hidden_size=8, num_layers=1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "zamba2-1.2b"},
        {"preset": "zamba2-7b", "streaming": True},
        {"preset": "mamba2-1.3b"},
        {"preset": "mistral-7b-v0.1", "streaming": True},
    ],
)
def test_released_sizes_are_within_the_limits(options):
    assert Parity(**options, seq=128).run() == 0


def test_random_weights_are_the_same_for_the_same_seed_and_never_neutral():
    first, again, other = (random_model(SMALL, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.layers[0].mamba.in_z[...], again.layers[0].mamba.in_z[...])
    assert not np.array_equal(first.layers[0].mamba.in_z[...], other.layers[0].mamba.in_z[...])
    assert np.ptp(first.layers[0].norm[...]) > 0.5
    assert np.ptp(first.layers[0].mamba.conv_bc_bias[...]) > 0.5
