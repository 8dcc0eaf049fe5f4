"""The health of a run: what a step measures, whatever way it is computed, and what is said of it."""

import dataclasses
import math
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, random_model
from tests.ops.test_attention_entropy import entropies
from tests.train.test_step_config import CONFIG, packed
from zamba2_jax import capture
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.parallel.mesh import make_mesh, shard_model
from zamba2_jax.train.health import IN_A_ROW, HealthWatch, group_of, health_record, worst
from zamba2_jax.train.metrics import CallHealth, GroupHealth, HealthRecord
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import StepConfig, init_state, train_step

CONFIG = dataclasses.replace(CONFIG, num_layers=4, hybrid_layer_ids=(1, 3), mamba_heads=8, tie_embeddings=False)
OPTIMIZER, RATE = AdamW().transformation(), 1e-3
PATTERNS = {
    "embedding": ["embed"],
    "mixers": ["layers.*"],
    "shared_blocks": ["shared.*"],
    "adapters": ["calls.*_a", "calls.*.a", "calls.*_b"],
    "linears": ["calls.*.linear"],
    "head": ["head", "norm"],
}


def of_taps(model, batch):
    """The calls' numbers, in numpy, from what flows in a plain pass."""
    select = ("*.input", "*.shared.output", "*.attention.q", "*.attention.k")
    tokens, segment_ids = map(jnp.asarray, (batch.tokens, batch.segment_ids))
    _, seen, _ = jax.jit(lambda model: capture(model, tokens, select=select, segment_ids=segment_ids))(model)
    seen, real = {name: np.asarray(value) for name, value in seen.items()}, batch.segment_ids != 0
    found = {}
    for layer in (f"layers.{i}" for i in model.config.hybrid_layer_ids):
        h, t = seen[f"{layer}.input"][real], seen[f"{layer}.shared.output"][real]
        q, k = (seen[f"{layer}.shared.attention.{name}"] for name in "qk")
        share = (t * (h + t)).sum(axis=-1) / np.square(h + t).sum(axis=-1)
        entropy = np.nanmean(entropies(q, k, model.config.attention_scale, batch.segment_ids), axis=(0, 1))
        found[layer] = CallHealth(
            ratio=math.sqrt(np.square(t).mean() / np.square(h).mean()), share=share.mean(), entropy=tuple(entropy)
        )
    return found


def of_step(before, after):
    """The groups' numbers from the states before and after the first step: Adam's mean is a tenth of the gradient."""
    _, adam, _ = after.opt_state

    def norms(tree):
        arrays = {name: np.asarray(parameter[...]) for name, parameter in named_parameters(tree).items()}
        return {
            group: math.sqrt(sum(np.square(a).sum() for n, a in arrays.items() if any(fnmatchcase(n, p) for p in ps)))
            for group, ps in PATTERNS.items()
        }

    gradients, weights = norms(adam.mu), norms(before.model)
    changes = norms(jax.tree.map(lambda new, old: new - old, after.model, before.model))
    sizes = dict.fromkeys(PATTERNS, 0)
    for name, parameter in named_parameters(before.model).items():
        (group,) = (group for group, patterns in PATTERNS.items() if any(fnmatchcase(name, p) for p in patterns))
        assert group_of(name) == group
        sizes[group] += parameter.size
    clipped = math.sqrt(sum((norm / 0.1) ** 2 for norm in gradients.values()))
    return clipped, {
        group: GroupHealth(
            grad_norm=gradients[group] / 0.1,
            update=changes[group] / weights[group],
            step=changes[group] / math.sqrt(sizes[group]) / RATE,
        )
        for group in PATTERNS
    }


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param({"scan_layers": False}, {}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": True, "remat": "matmuls"}, {"data": 2}, marks=pytest.mark.slow),
        pytest.param({"remat": "layer", "microbatches": 2}, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        ({"scan_layers": True, "remat": "layer", "microbatches": 2}, {"data": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_a_step_measures_what_taps_of_a_plain_pass_show(x64, options, sizes):
    model, batch = random_model(CONFIG, jnp.float64), packed()
    calls, mesh = of_taps(model, batch), make_mesh(**sizes)
    with jax.set_mesh(mesh):
        state = init_state(shard_model(model, mesh), OPTIMIZER)
        step = jax.jit(
            lambda state: train_step(
                state,
                batch,
                optimizer=OPTIMIZER,
                schedule=lambda step: RATE,
                config=StepConfig(**options),
                health_every=2,
            )
        )
        _, unmeasured = step(state)
        assert not any(array.any() for array in jax.tree.leaves(unmeasured.health))
        state = dataclasses.replace(state, step=jnp.int32(5))
        after, metrics = step(state)
    clipped, groups = of_step(state, after)
    record = health_record(metrics.health, CONFIG.hybrid_layer_ids, phase="p", step=6, rate=RATE)
    assert (record.phase, record.step) == ("p", 6)
    assert_close(dataclasses.asdict(record)["calls"], {k: dataclasses.asdict(v) for k, v in calls.items()}, 1e-9)
    scale = max(1.0, float(metrics.grad_norm)) / 1.0
    assert clipped == pytest.approx(min(1.0, float(metrics.grad_norm)), rel=1e-6)
    for name, group in groups.items():
        assert record.groups[name].grad_norm == pytest.approx(group.grad_norm * scale, rel=1e-6), name
        assert record.groups[name].update == pytest.approx(group.update, rel=1e-6), name
        assert record.groups[name].step == pytest.approx(group.step, rel=1e-6), name


def record(step, *, ratio=0.5, entropy=0.7, moved=0.3, rate_is_zero=False):
    healthy = CallHealth(ratio=0.4, share=0.2, entropy=(0.5, 0.6))
    return HealthRecord(
        phase="p",
        step=step,
        calls={"layers.1": healthy, "layers.3": CallHealth(ratio=ratio, share=0.9, entropy=(1.0, entropy))},
        groups={
            "mixers": GroupHealth(grad_norm=1.0, update=0.01, step=0.5),
            "adapters": GroupHealth(grad_norm=1e-9, update=1e-9, step=math.nan if rate_is_zero else moved),
        },
    )


def test_a_fault_that_lasts_is_said_once():
    watch, fault = HealthWatch(steps=1000), {"ratio": 63.4}
    assert [watch(record(step, **fault)) for step in (20, 40)] == [[], []]
    assert watch(record(60)) == []  # it has gone: the count begins anew
    for step in range(80, 60 + 20 * IN_A_ROW, 20):
        assert watch(record(step, **fault)) == []
    (said,) = watch(record(60 + 20 * IN_A_ROW, **fault))
    assert said.startswith("layers.3: the shared block drowns the residual stream, its output is 63.4 times as large")
    assert said.endswith("(step 120; see docs/health.md)")
    assert not any(watch(record(step, **fault)) for step in range(140, 1000, 20))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"entropy": 0.99}, "layers.3: attention stays uniform, the head that looks least evenly has 0.990 of"),
        ({"moved": 1e-5}, "adapters: the parameters have stopped moving, a step changes them by 1e-05 of the learning"),
        ({"ratio": 0.001}, "layers.3: the shared block is idle, its output is 0.001 times the residual stream"),
    ],
)
def test_what_is_so_at_first_may_be_so_for_a_while(fault, message):
    watch, said = HealthWatch(steps=1000), {}
    for step in range(20, 1001, 20):
        for text in watch(record(step, **fault)):
            said[step] = text
    assert list(said) == [120]
    assert said[120].startswith(message)


def test_a_healthy_run_is_told_nothing_and_the_worst_is_on_a_line():
    watch = HealthWatch(steps=100)
    assert not any(watch(record(step, rate_is_zero=step == 10)) for step in range(10, 100, 10))
    line = worst(record(1, ratio=2.0))
    assert line == "shared/residual 2 in layers.3, attention 0.70 uniform in layers.3, adapters move 0.3"
