"""Batches and signals where a run spans several processes, each with some of the mesh's devices."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from zamba2_jax.parallel.mesh import MeshSizes, batch_sharding, make_mesh
from zamba2_jax.typing import Tree


def run_mesh(sizes: MeshSizes) -> Mesh:
    """The mesh of a run, over all devices if there are several processes, else over the first ones.

    Raises:
        ValueError: the devices are too few, or with several processes too many.
    """
    mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, sequence=sizes.sequence)
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"mesh {dict(mesh.shape)} has {mesh.size} devices: expected all {jax.device_count()} "
            f"of the {jax.process_count()} processes"
        )
    return mesh


def choose_mesh(allowed: Sequence[MeshSizes]) -> MeshSizes:
    """The one of some meshes that takes the most of the devices that are there; of several, the first.

    Raises:
        ValueError: there are too few devices for any of them; or, with several processes, none takes all devices.
    """
    count, several = jax.device_count(), jax.process_count() > 1
    sizes = [math.prod(dataclasses.astuple(mesh)) for mesh in allowed]
    fitting = [size for size in sizes if (size == count if several else size <= count)]
    if not fitting:
        taken = f"all {count} devices of the {jax.process_count()} processes" if several else f"at most {count} devices"
        raise ValueError(f"meshes take {', '.join(map(str, sizes))} devices: expected one that takes {taken}")
    return allowed[sizes.index(max(fitting))]


def host_share(mesh: Mesh, batch_size: int, length: int) -> tuple[int, int]:
    """Which part of the rows of a batch this process reads, of how many: its index and their count.

    Raises:
        ValueError: as `shares`.
    """
    rows: dict[int, set[tuple[int, int]]] = {}
    places = batch_sharding(mesh).devices_indices_map((batch_size, length))
    for device in mesh.devices.flat:
        rows.setdefault(device.process_index, set()).add(places[device][0].indices(batch_size)[:2])
    return shares(rows)[jax.process_index()]


def shares(rows: Mapping[int, Collection[tuple[int, int]]]) -> dict[int, tuple[int, int]]:
    """Which part of the rows each process reads, of how many.

    Processes that hold the same rows, as those along `tensor` do, read the same part.

    Args:
        rows: the ranges of rows that the devices of each process hold.

    Raises:
        ValueError: two processes hold some rows in common, but not all; or not the same number.
    """
    parts = sorted({tuple(sorted(ranges)) for ranges in rows.values()})
    ranges = [range_ for part in parts for range_ in part]
    if len(set(ranges)) < len(ranges) or len({len(part) for part in parts}) > 1:
        raise ValueError(f"the mesh gives the processes the rows {dict(rows)}: expected the same, or others, to each")
    return {process: (parts.index(tuple(sorted(ranges))), len(parts)) for process, ranges in rows.items()}


def place(batch: Tree, mesh: Mesh, batch_size: int) -> Tree:
    """A batch of `batch_size` rows on the mesh.

    Args:
        batch: arrays [b, t], the rows of `host_share`, or all of them.
        mesh: of the run.
        batch_size: rows of all processes together.
    """

    def placed(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(mesh), array, (batch_size, array.shape[1]))

    return jax.tree.map(placed, batch)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM into a question to ask after every step: whether this is the step to stop after.

    With several processes, one of which has the signal, all of them stop after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = False

    def remember(number: int, frame: object) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda step: received
    finally:
        signal.signal(signal.SIGTERM, before)
