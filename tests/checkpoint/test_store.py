import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import SMALL, abstract_model, random_model
from zamba2_jax.checkpoint.store import restore_state, save_state
from zamba2_jax.parallel.mesh import make_mesh
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import init_state

OPTIMIZER = AdamW().transformation()


@pytest.fixture
def state():
    """A state in which no two arrays are equal."""
    leaves, structure = jax.tree.flatten(init_state(random_model(SMALL), OPTIMIZER))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(
        structure, [jnp.asarray(100 * random.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    )


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_is_exact(state, tmp_path, abstract):
    save_state(tmp_path / "new" / "checkpoint", state)
    like = jax.eval_shape(lambda: state) if abstract else jax.tree.map(jnp.zeros_like, state)
    assert_same(restore_state(tmp_path / "new" / "checkpoint", like), state)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint"]


def test_bfloat16_and_values_that_are_not_finite(tmp_path):
    saved = {"w": jnp.array([1.5, -jnp.inf, jnp.nan], jnp.bfloat16), "n": (jnp.int32(7), jnp.uint32([1, 2**32 - 1]))}
    save_state(tmp_path / "checkpoint", saved)
    assert_same(restore_state(tmp_path / "checkpoint", saved), saved)


def test_arrays_go_where_the_target_says(tmp_path):
    sharding = NamedSharding(make_mesh(fsdp=4), PartitionSpec("fsdp"))
    saved = {"w": jnp.arange(8.0)}
    save_state(tmp_path / "checkpoint", saved)
    like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    restored = restore_state(tmp_path / "checkpoint", like)
    assert restored["w"].sharding == sharding
    assert_same(restored, saved)


def test_another_architecture_is_refused_with_all_differences(tmp_path):
    save_state(tmp_path / "checkpoint", random_model(SMALL))
    other = dataclasses.replace(SMALL, ffn_size=44, num_layers=4, tie_embeddings=False)
    with pytest.raises(ValueError, match="is of another state") as error:
        restore_state(tmp_path / "checkpoint", abstract_model(other))
    message = str(error.value)
    assert "head: missing in the checkpoint" in message
    assert "layers.3.mamba.in_z: missing in the checkpoint" in message
    assert "shared.0.mlp.gate: float32[40, 24] in the checkpoint, expected float32[44, 24]" in message
    assert "layers.2" not in message
    shorter = dataclasses.replace(SMALL, num_layers=2, hybrid_layer_ids=(0,))
    with pytest.raises(ValueError, match=r"layers\.2\.norm: in the checkpoint only"):
        restore_state(tmp_path / "checkpoint", abstract_model(shorter))


def test_another_dtype_is_refused(tmp_path):
    save_state(tmp_path / "checkpoint", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"w: float32\[3\] in the checkpoint, expected bfloat16\[3\]"):
        restore_state(tmp_path / "checkpoint", {"w": jnp.ones(3, jnp.bfloat16)})


def test_nothing_is_overwritten(tmp_path):
    save_state(tmp_path / "checkpoint", {"w": jnp.ones(3)})
    with pytest.raises(FileExistsError, match="exists"):
        save_state(tmp_path / "checkpoint", {"w": jnp.zeros(3)})
    assert_same(restore_state(tmp_path / "checkpoint", {"w": jnp.zeros(3)}), {"w": jnp.ones(3)})


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
def test_no_checkpoint(tmp_path, make):
    make(tmp_path / "checkpoint")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        restore_state(tmp_path / "checkpoint", {"w": jnp.zeros(3)})
