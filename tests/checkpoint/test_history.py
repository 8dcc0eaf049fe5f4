import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tests.helpers import SMALL, abstract_model, random_model
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.checkpoint.remote import RemoteCheckpoints
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.storage.remote import RemoteDirectory


@struct.dataclass
class State:
    """A model and more, as a run has them."""

    step: jax.Array
    model: LanguageModel
    moments: LanguageModel


def state(step):
    return State(step=jnp.int32(step), model=random_model(SMALL, seed=step), moments=random_model(SMALL, seed=99))


def assert_equal(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A directory with the checkpoints 4, 8 and 9; 2, 3, 5, 6 and 7 were dropped."""
    directory = tmp_path_factory.mktemp("history")
    with Checkpoints(directory, keep_last=2, keep_every=4) as checkpoints:
        for step in range(2, 10):
            saved = state(step)
            checkpoints.save(step, saved, {"step": step, "loss": 0.1 + 0.2})
            jax.tree.map(lambda array: array.delete(), saved)  # as a step does that takes the buffers over
    return directory


def test_the_last_ones_and_every_fourth_are_kept_and_come_back(history):
    with Checkpoints(history, read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest[-2:]) == ([4, 8, 9], "/9")
        for step in (4, 9):
            restored, note = checkpoints.restore(step, jax.eval_shape(lambda: state(0)))
            assert_equal(restored, state(step))
            assert note == {"step": step, "loss": 0.1 + 0.2}
        assert_equal(checkpoints.restore_part(8, abstract_model(SMALL), "model"), random_model(SMALL, seed=8))


def test_what_is_not_there_is_named(history):
    like = jax.eval_shape(lambda: state(0))
    with Checkpoints(history, read_only=True) as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in .*, which has \[4, 8, 9\]"):
            checkpoints.restore(5, like)
        other = abstract_model(SMALL, jnp.bfloat16)
        with pytest.raises(
            ValueError, match=r"(?s)of another state:\n  model\..*\n  model\.embed: float32\[32, 24\] in"
        ):
            checkpoints.restore(9, like.replace(model=other))
    with pytest.raises(FileNotFoundError, match="is not there, expected a directory of checkpoints"):
        Checkpoints(history / "none", read_only=True)


def test_a_checkpoint_that_was_cut_off_is_none(history, tmp_path):
    shutil.copytree(history, tmp_path, dirs_exist_ok=True)
    cut_off = tmp_path / "12.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "9", cut_off)
    next((cut_off / "state" / "d").iterdir()).unlink()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [4, 8, 9]
    assert cut_off.exists()  # another process may be writing it
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [4, 8, 9]
        checkpoints.save(12, state(12), {})
        checkpoints.wait()
        assert_equal(checkpoints.restore(12, jax.eval_shape(lambda: state(0)))[0], state(12))
    assert not cut_off.exists()


@pytest.mark.filterwarnings("ignore")  # of Orbax, about what it leaves behind
def test_a_disk_that_takes_no_more_leaves_the_last_good_one(history, tmp_path):
    shutil.copytree(history, tmp_path, dirs_exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # bytes that a file can have
        try:
            with pytest.raises(OSError, match=r"a checkpoint could not be written: .*File too large"):
                save_and_wait(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps[-1] == 9
        assert_equal(checkpoints.restore(9, jax.eval_shape(lambda: state(0)))[0], state(9))


def save_and_wait(checkpoints):
    checkpoints.save(10, state(10), {})
    checkpoints.wait()


@pytest.mark.parametrize("remote", [False, True])
def test_later_ones_are_deleted_and_written_anew(tmp_path, remote):
    def opened(name):
        if remote:
            return RemoteCheckpoints(RemoteDirectory(f"memory:/{tmp_path}/history"), tmp_path / name)
        return Checkpoints(tmp_path / "history")

    with opened("first") as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {})
    with opened("second") as checkpoints:
        checkpoints.delete_from(3)
        assert checkpoints.steps == [2]
        checkpoints.save(4, {"x": jnp.full(3, 40)}, {"anew": True})
    with opened("third") as checkpoints:
        assert checkpoints.steps == [2, 4]
        restored, note = checkpoints.restore(4, {"x": jax.ShapeDtypeStruct((3,), jnp.int32)})
        assert (restored["x"].tolist(), note) == ([40] * 3, {"anew": True})
