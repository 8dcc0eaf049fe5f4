import os
import signal

import jax
import numpy as np
import pytest

from zamba2_jax.data.batches import Batch
from zamba2_jax.parallel.hosts import choose_mesh, host_share, place, preemption, shares
from zamba2_jax.parallel.mesh import MeshSizes, make_mesh


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Each its own; a torus may deal them out in turn; along `tensor` both hold the same.
        ({0: {(0, 4)}, 1: {(4, 8)}}, {0: (0, 2), 1: (1, 2)}),
        ({0: {(2, 4), (6, 8)}, 1: {(0, 2), (4, 6)}}, {0: (1, 2), 1: (0, 2)}),
        ({0: {(0, 4)}, 1: {(0, 4)}, 2: {(4, 8)}, 3: {(4, 8)}}, {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    ],
)
def test_every_row_is_read_once(rows, expected):
    assert shares(rows) == expected


@pytest.mark.parametrize(
    "rows", [{0: {(0, 2), (2, 4)}, 1: {(2, 4), (4, 6)}}, {0: {(0, 2), (2, 4)}, 1: {(4, 6)}, 2: {(6, 8), (8, 10)}}]
)
def test_rows_that_overlap_or_differ_in_number_are_refused(rows):
    with pytest.raises(ValueError, match="the mesh gives the processes the rows"):
        shares(rows)


def test_a_batch_on_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, sequence=2)
    tokens = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    placed = place(Batch(tokens=tokens, segment_ids=tokens % 3), mesh, 4)
    np.testing.assert_array_equal(placed.tokens, tokens)
    np.testing.assert_array_equal(placed.segment_ids, tokens % 3)
    assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {(1, 3)}
    assert host_share(mesh, 4, 6) == (0, 1)
    assert jax.process_count() == 1


def test_sigterm_is_remembered_and_then_forgotten():
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as preempted:
        assert not preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted(2)
    assert signal.getsignal(signal.SIGTERM) == before


MESHES = [MeshSizes(data=3), MeshSizes(fsdp=4), MeshSizes(data=2, tensor=2), MeshSizes(data=2, fsdp=4)]


@pytest.mark.parametrize(
    ("devices", "processes", "expected"), [(8, 1, 3), (9, 1, 3), (7, 1, 1), (4, 2, 1), (3, 1, 0), (3, 3, 0), (8, 2, 3)]
)
def test_the_mesh_with_the_most_devices_is_chosen(monkeypatch, devices, processes, expected):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert choose_mesh(MESHES) == MESHES[expected]


@pytest.mark.parametrize(
    ("devices", "processes", "message"),
    [
        (2, 1, "meshes take 3, 4, 4, 8 devices: expected one that takes at most 2 devices"),
        (7, 2, "meshes take 3, 4, 4, 8 devices: expected one that takes all 7 devices of the 2 processes"),
    ],
)
def test_devices_without_a_mesh_are_named(monkeypatch, devices, processes, message):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(ValueError, match=message):
        choose_mesh(MESHES)
