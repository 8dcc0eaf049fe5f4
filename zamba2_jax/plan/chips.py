"""The chips a step can be planned for, and slices of them."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from zamba2_jax.parallel.mesh import MESH_AXES
from zamba2_jax.train.peak import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by its data sheet.

    Attributes:
        memory: bytes of HBM.
        flops: bfloat16 operations per second at peak.
        memory_bandwidth: bytes of HBM per second.
        link_bandwidth: bytes per second over all links to other chips, of one direction.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: "HBM capacity", "Peak compute per chip (bf16)", "HBM bandwidth", and
# half of "Bidirectional inter-chip interconnect (ICI) bandwidth". The CPU has round numbers of no machine.
CHIPS = {
    "v5e": Chip(16e9, PEAK_FLOPS["TPU v5 lite"], 819e9, 400e9 / 2),
    "v5p": Chip(95e9, PEAK_FLOPS["TPU v5"], 2765e9, 1200e9 / 2),
    "v6e": Chip(32e9, PEAK_FLOPS["TPU v6 lite"], 1638e9, 800e9 / 2),
    "cpu": Chip(16e9, 1e12, 100e9, 10e9),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined.

    Attributes:
        chip: what it is made of.
        devices: to compile for; none needs to be there.
    """

    chip: Chip
    devices: Sequence[jax.Device]

    def mesh(self, *, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
        """A mesh over all chips, for `jax.set_mesh`.

        Raises:
            ValueError: the sizes do not multiply to the number of chips.
        """
        sizes = (data, fsdp, tensor, sequence)
        if min(sizes) < 1 or math.prod(sizes) != len(self.devices):
            asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
            raise ValueError(f"mesh {asked}: expected sizes >= 1 with the product {len(self.devices)}, all chips")
        return Mesh(np.reshape(self.devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a TPU that two processes could want
    # What it would ask for, and complains about at length if nobody says it; the topology is what counts.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""Of the environment, for the TPU compiler on a machine without a TPU."""


def describe_slice(topology: str) -> Slice:
    """The slice with a name such as "v5e:16x16" or "v5p:4x4x4", or "cpu:8" for the first 8 CPU devices.

    Raises:
        ValueError: the name is not of this form, the chip is unknown, there is no such slice, there are fewer CPU
            devices, or the extra `tpu` is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology {topology!r}: expected chip:shape, as v5e:16x16, with a chip of {', '.join(CHIPS)}")
    count = math.prod(map(int, shape.split("x")))
    if name == "cpu":
        devices = jax.devices("cpu")
        if count > len(devices):
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            raise ValueError(f"topology {topology!r}: {len(devices)} CPU devices are there; {flag} gives {count}")
        return Slice(CHIPS[name], devices[:count])
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {topology!r} needs the TPU compiler: pip install 'zamba2-jax[tpu]'")
    for variable, value in WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r} is not one the TPU compiler knows: {error}") from error
    return Slice(CHIPS[name], devices)
