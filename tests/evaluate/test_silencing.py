import io
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.helpers import SMALL, forward, random_model
from zamba2_jax import capture, preset
from zamba2_jax.data.batches import Batch
from zamba2_jax.evaluate import necessity
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.train.step import evaluate

MEANS = {
    "shared": "layers.{}.shared.output",
    "mlp": "layers.{}.shared.mlp.output",
    "mixer": "layers.{}.mamba.output",
}
"""Kinds that are silenced by their means, and where their outputs are tapped."""


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


@pytest.fixture(scope="module")
def batches():
    """Packed documents, padding at either end, and a row that is empty."""
    random = np.random.default_rng(0)
    segment_ids = np.array(
        [
            [[1] * 7 + [2] * 5, [0] * 2 + [1] * 6 + [0] * 4, [1] * 12],
            [[1] * 3 + [2] * 9, [0] * 12, [1] * 12],
        ],
        np.int32,
    )
    tokens = np.where(segment_ids != 0, random.integers(3, SMALL.vocab_size, segment_ids.shape, dtype=np.int32), 0)
    return [Batch(tokens=t, segment_ids=s) for t, s in zip(tokens, segment_ids, strict=True)]


@pytest.fixture(scope="module")
def found(model, batches):
    return necessity(model, batches)


def scored(logits, batch):
    """Of each row, sum of losses, right answers and tokens predicted, in numpy."""
    logits, targets = np.asarray(logits, np.float64)[:, :-1], batch.tokens[:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    counted = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] != 0)
    right = logits.argmax(axis=-1) == targets
    return np.stack([(value * counted).sum(axis=1) for value in (nll, right, np.ones_like(nll))])


def scored_all(logits_of, batches):
    return np.concatenate([scored(logits_of(batch), batch) for batch in batches], axis=1)


def losses(logits_of, batches):
    nll, right, count = scored_all(logits_of, batches).sum(axis=1)
    return nll / count, right / count


def zeroed(model, *endings):
    """The model with the parameters at 0 whose paths end so."""
    values = {name: parameter[...] for name, parameter in named_parameters(model).items()}
    assert all(any(name.endswith(ending) for name in values) for ending in endings)
    return with_values(model, {name: 0 * v if name.endswith(endings) else v for name, v in values.items()})


def test_nothing_silenced_is_the_model(model, batches, found):
    assert found.loss == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
    plain = scored_all(lambda batch: forward(model, batch.tokens, batch.segment_ids), batches)
    assert found.accuracy == pytest.approx(plain[1].sum() / plain[2].sum(), rel=1e-6)
    assert (found.tokens, found.rows) == (6 + 4 + 5 + 11 + 2 + 8 + 11, 5)


# The one block of SMALL is called by layers 0 and 2, in this order.
Q = ("attention.q_residual", "attention.q_embedded", "attention.q_a")
CASES = {
    "all.attention": Q,
    "layers.0.adapters": tuple(
        f"calls.0.{name}" for name in ("attention.q_a", "attention.k_a", "attention.v_a", "mlp.a")
    ),
    "all.adapters": ("q_a", "k_a", "v_a", "mlp.a"),
    "layers.2.layer": ("layers.2.mamba.out",),
    "plain.layer": ("layers.1.mamba.out",),
    "hybrid.layer": ("layers.0.mamba.out", "layers.2.mamba.out"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_part_silenced_is_the_model_without_its_weights(model, batches, found, name):
    without = zeroed(model, *CASES[name])
    loss, accuracy = losses(lambda batch: forward(without, batch.tokens, batch.segment_ids), batches)
    assert found[name].loss == pytest.approx(loss, rel=1e-5)
    assert found[name].accuracy == pytest.approx(accuracy, rel=1e-6)
    assert found[name].increase == pytest.approx(loss - found.loss, abs=1e-5)
    assert abs(found[name].increase) > 3e-4


@jax.jit
def edited(model, tokens, segment_ids, chosen):
    """Logits with what is chosen of attention's q at 0, and of `MEANS` at the mean over the tokens that are real."""

    def mean(value):
        return jnp.ones_like(value) * jnp.average(value, axis=(0, 1), weights=(segment_ids != 0) + 0.0)

    taps = [("attention", "layers.{}.shared.attention.q", jnp.zeros_like)]
    taps += [(kind, tap, mean) for kind, tap in MEANS.items()]
    edits = {
        tap.format(layer): lambda value, edit=edit, on=chosen[f"layers.{layer}.{kind}"]: jnp.where(
            on, edit(value), value
        )
        for kind, tap, edit in taps
        for layer in ((0, 1, 2) if kind == "mixer" else (0, 2))
    }
    return capture(model, tokens, select=(), edits=edits, segment_ids=segment_ids).logits


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("layers.2.attention", [2]),
        ("layers.0.shared", [0]),
        ("all.shared", [0, 2]),
        ("layers.2.mlp", [2]),
        ("layers.1.mixer", [1]),
        ("hybrid.mixer", [0, 2]),
        ("all.mixer", [0, 1, 2]),
    ],
)
def test_a_part_at_its_mean_is_the_model_with_the_tap_edited(model, batches, found, name, layers):
    kind = name.split(".")[-1]
    names = [f"layers.{layer}.{other}" for layer in (0, 1, 2) for other in (*MEANS, "attention")]
    chosen = {other: other in [f"layers.{layer}.{kind}" for layer in layers] for other in names}
    rows = scored_all(lambda batch: edited(model, batch.tokens, batch.segment_ids, chosen), batches)
    nll, right, count = rows.sum(axis=1)
    assert found[name].loss == pytest.approx(nll / count, rel=1e-5)
    assert found[name].accuracy == pytest.approx(right / count, rel=1e-6)
    assert abs(found[name].increase) > 3e-4


def test_the_parts_of_a_transformer(batches):
    """Attention and MLP of a layer, against edits of its taps and against weights at 0."""
    model = random_model(preset("transformer-tiny"))
    found = necessity(model, batches)
    kinds = ("attention", "mlp", "mixer", "layer")
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in kinds]
    assert [of.part.name for of in found.silenced] == [*names, *(f"all.{kind}" for kind in kinds[:-1])]

    def check(name, logits_of):
        loss, accuracy = losses(logits_of, batches)
        assert found[name].loss == pytest.approx(loss, rel=1e-5), name
        assert found[name].accuracy == pytest.approx(accuracy, rel=1e-6), name
        assert abs(found[name].increase) > 3e-4, name

    def with_edits(batch, *taps):
        def mean(value):
            return jnp.ones_like(value) * jnp.average(value, axis=(0, 1), weights=(batch.segment_ids != 0) + 0.0)

        edits = dict.fromkeys(taps, mean)
        return capture(
            model, jnp.asarray(batch.tokens), select=(), edits=edits, segment_ids=jnp.asarray(batch.segment_ids)
        ).logits

    for name, *endings in (
        ("all.attention", "attention.q"),
        ("layers.1.layer", "layers.1.attention.o", "layers.1.mlp.down"),
    ):
        without = zeroed(model, *endings)
        check(name, lambda batch, without=without: forward(without, batch.tokens, batch.segment_ids))
    for name, tap in (("layers.2.mlp", "layers.2.mlp.output"), ("all.mixer", "layers.*.attention.output")):
        check(name, lambda batch, tap=tap: with_edits(batch, tap))


def test_the_error_is_that_of_a_mean_over_rows(model, batches, found):
    """Where every row predicts as many tokens it is the standard error of their means."""
    batch = Batch(tokens=batches[0].tokens, segment_ids=np.ones((3, 12), np.int32))
    part = necessity(model, [batch], select=["layers.1.layer"])["layers.1.layer"]
    without = zeroed(model, "layers.1.mamba.out")
    nll, plain = (scored(forward(m, batch.tokens, batch.segment_ids), batch)[0] for m in (without, model))
    rises = (nll - plain) / 11
    assert part.error == pytest.approx(rises.std(ddof=1) / math.sqrt(3), rel=1e-4)
    assert part.is_significant == (abs(rises.mean()) > 2 * part.error)
    one = Batch(tokens=batch.tokens[:1], segment_ids=batch.segment_ids[:1])
    assert math.isnan(necessity(model, [one], select=["plain.layer"])["plain.layer"].error)


def test_tokens_count_by_their_weights(model, batches):
    batch = Batch(
        tokens=batches[0].tokens,
        segment_ids=np.ones((3, 12), np.int32),
        weights=np.random.default_rng(0).choice([0, 0.5, 1], (3, 12)).astype(np.float32),
    )
    found = necessity(model, [batch], select=["layers.1.layer"])
    weights = batch.weights[:, 1:]
    for of, found_loss, found_accuracy in (
        (model, found.loss, found.accuracy),
        (zeroed(model, "layers.1.mamba.out"), found["layers.1.layer"].loss, found["layers.1.layer"].accuracy),
    ):
        log_p = jax.nn.log_softmax(forward(of, batch.tokens, batch.segment_ids)[:, :-1])
        nll = -np.take_along_axis(np.asarray(log_p), batch.tokens[:, 1:, None], axis=-1)[..., 0]
        right = np.asarray(log_p.argmax(axis=-1)) == batch.tokens[:, 1:]
        assert found_loss == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)
        assert found_accuracy == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-5)
    assert found.tokens == (weights != 0).sum()


def test_what_is_shown(found, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table(), found.table("accuracy"))
    text = console.export_text()
    for part in (
        f"{found['hybrid.mixer'].increase:+.4f} ±",
        f"{found['all.shared'].accuracy:.3f}",
        "attention uniform",
    ):
        assert part in text
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["silenced"]["layers.1.mixer"]["loss"] == found["layers.1.mixer"].loss
    found.plot(tmp_path / "necessity.png")
    header = (tmp_path / "necessity.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:])[0] > 500
    with pytest.raises(KeyError, match=r"layers\.1\.shared: expected one of layers\.0\.attention"):
        found["layers.1.shared"]


def test_wrong_arguments_are_named(model, batches):
    with pytest.raises(ValueError, match=r"no part matches \['layers\.1\.shared'\]: expected names as layers\.0"):
        necessity(model, batches, select=["*.mixer", "layers.1.shared"])
    empty = Batch(tokens=np.zeros((3, 12), np.int32), segment_ids=np.zeros((3, 12), np.int32))
    with pytest.raises(ValueError, match="no token to predict"):
        necessity(model, [empty], select=["all.mixer"])
