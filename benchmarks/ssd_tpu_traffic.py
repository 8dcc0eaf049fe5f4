"""How many bytes does the scan move on a TPU, over the fewest possible: the Pallas kernels against plain XLA?

Compiles both for TPUs that are not there, with the compiler of the `tpu` extra, and counts:

- Kernels: a block crosses the memory bus whenever its index changes from one step of the grid to the next, padding to
  tiles included; and operands and results in main memory of every operation that XLA puts around the kernels.
- Plain XLA: what `plan.hlo.traffic` reads from the program, with the bodies of loops as often as they run.
- The floor: inputs and cotangents read once, outputs written once, without padding.

Backward is what a gradient moves beyond a plain forward pass, the states that its forward pass saves included. Every
case is compiled from a state of zeros and from one that is given; plain XLA only from zeros, on one chip at one length,
or everywhere with `--all`. Prints a table and writes ssd_tpu_traffic.json beside this file.

    pip install 'zamba2-jax[tpu]'
    python benchmarks/ssd_tpu_traffic.py
"""

import argparse
import importlib.util
import itertools
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import RELEASED, array_bytes, gradient, save_results, scan_sizes, use_absent_tpus, use_cpu
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params
from jax.sharding import SingleDeviceSharding

from zamba2_jax.ops import ssd
from zamba2_jax.ops.ssd_pallas_tpu import ssd_pallas_tpu
from zamba2_jax.plan.hlo import traffic

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = (2048, 4096, 8192)
DTYPES = ("bfloat16", "float32")
STARTS = ("zeros", "given")

# What moves no byte, or moves an operand of a kernel to VMEM ahead of it, where it is counted as read by the kernel.
FREE = "parameter constant bitcast get-tuple-element tuple copy-start copy-done custom-call after-all".split()
OPAQUE = ("while", "conditional", "call")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(?:, |$)")
SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]\{([\d,]*)([^}]*)")
IN_VMEM = "S(1)"


def physical_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array, last axis fastest, in tiles of 8 by 128 words of 32 bits."""
    sizes = list(shape)
    sizes[-1] = -(-sizes[-1] // 128) * 128
    if len(sizes) > 1 and sizes[-2] > 1:
        tile = 8 * 4 // itemsize
        sizes[-2] = -(-sizes[-2] // tile) * tile
    return int(np.prod(sizes)) * itemsize


def kernels(jaxpr: Any) -> Iterator[Any]:
    """The grid mappings of all Pallas calls of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["grid_mapping"]
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from kernels(inner)


def kernel_bytes(mapping: Any) -> int:
    """What the blocks of one Pallas call move."""
    points = np.stack([axis.ravel() for axis in np.indices(mapping.grid)]).astype(np.int32)
    total = 0
    for block in mapping.block_mappings:
        index_map = jaxpr_as_fun(block.index_map_jaxpr)
        indices = np.stack([np.broadcast_to(axis, points[0].shape) for axis in jax.vmap(index_map)(*points)])
        transfers = 1 + np.any(np.diff(indices) != 0, axis=0).sum()
        shape = tuple(getattr(size, "block_size", size) for size in block.block_shape)
        total += int(transfers) * physical_bytes(shape, block.array_aval.dtype.itemsize)
    return total


def surrounding_bytes(text: str) -> int:
    """Operands and results of the operations of a compiled program around its kernels."""
    sizes, total = {}, 0
    for line in text[text.index("\nENTRY") :].splitlines():
        if not (match := INSTRUCTION.match(line)):
            continue
        name, result, operation, operands = match.groups()
        if operation in OPAQUE:
            raise ValueError(f"{operation}: its body is not counted")
        sizes[name] = sum(map(hlo_bytes, SHAPE.finditer(result)))
        if operation not in FREE:
            total += sizes[name] + sum(sizes[operand] for operand in re.findall(r"%([^\s,)]+)", operands))
    return total


def hlo_bytes(shape: re.Match) -> int:
    """Bytes in main memory of a shape of a compiled program, such as f32[2,3]{1,0:T(8,128)."""
    dtype, sizes, layout, place = shape.groups()
    if not sizes or IN_VMEM in place:
        return 0
    logical = [int(size) for size in sizes.split(",")]
    order = [int(axis) for axis in layout.split(",")]
    itemsize = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
    return physical_bytes(tuple(logical[axis] for axis in reversed(order)), itemsize)


def compiled(function: Callable[..., Any], arguments: Any) -> tuple[Any, float]:
    """The program, and the seconds it took to compile."""
    start = time.perf_counter()
    device = jax.sharding.AbstractDevice(device_kind="TPU", num_cores=None, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        program = jax.jit(function).lower(*arguments).compile()  # at the sizes of chunks that `ssd` takes on a TPU
    return program, time.perf_counter() - start


def scans(t: int, h: int, p: int, n: int, g: int) -> dict[str, Callable[..., Any]]:
    """Both implementations, of arrays as the model holds them: channels of all heads in one axis."""

    def split_heads(x: Any, B: Any, C: Any) -> tuple[Any, Any, Any]:
        return x.reshape(1, t, h, p), B.reshape(1, t, g, n), C.reshape(1, t, g, n)

    def pallas(x: Any, dt: Any, log_decay: Any, B: Any, C: Any, D: Any, first: Any = None) -> Any:
        x, B, C = split_heads(x, B, C)
        y, last = ssd_pallas_tpu(x, dt, log_decay, B, C, D, first)
        return y.reshape(1, t, h * p), last

    def xla(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, first: Any = None) -> Any:
        x, B, C = split_heads(x, B, C)
        y, last = ssd(x, dt, A, B, C, D, initial_state=first, implementation="xla")
        return y.reshape(1, t, h * p), last

    return {"pallas": pallas, "xla": xla}


def measure(
    chip: str, model: str, dtype: str, t: int, start: str, implementations: Collection[str]
) -> list[dict[str, Any]]:
    """Forward and backward, two rows of the table: one row of `t` tokens, from a state of "zeros" or a "given" one."""
    h, p, n, g = scan_sizes(model)
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, B = array(1, t, h * p, dtype=dtype), array(1, t, g * n, dtype=dtype)
    per_head, last = array(1, t, h), array(1, h, p, n)
    tail = (B, B, array(h), *([last] if start == "given" else []))
    arguments = {"pallas": (x, per_head, per_head, *tail), "xla": (x, per_head, array(h), *tail)}
    results = x, last
    floor = {
        "forward": array_bytes((arguments["pallas"], results)),
        "backward": array_bytes((arguments["pallas"], results, arguments["pallas"])),
    }
    moved: dict[str, dict[str, Any]] = {"forward": {}, "backward": {}}
    for name in implementations:
        function = scans(t, h, p, n, g)[name]
        programs = {
            "forward": (function, arguments[name]),
            "backward": (gradient(function), (arguments[name], results)),
        }
        before = 0
        for direction, (program_function, program_arguments) in programs.items():
            try:
                program, seconds = compiled(program_function, program_arguments)
            except jax.errors.JaxRuntimeError as error:  # out of memory on the chip: a result, not a failure
                moved[direction][name] = {"compiled": False, "error": str(error).splitlines()[0][:120]}
                continue
            if name == "pallas":
                jaxpr = jax.make_jaxpr(program_function)(*program_arguments).jaxpr
                total = sum(map(kernel_bytes, kernels(jaxpr))) + surrounding_bytes(program.as_text())
            else:
                total = int(traffic(program.as_text()).memory)
            moved[direction][name] = {
                "compiled": True,
                "bytes": total - before,
                "ratio": round((total - before) / floor[direction], 3),
                "temp_bytes": program.memory_analysis().temp_size_in_bytes,
                "compile_seconds": round(seconds, 1),
            }
            before = total
    case = {"chip": chip, "model": model, "dtype": dtype, "t": t, "start": start}
    return [{**case, "direction": key, "floor_bytes": floor[key], **moved[key]} for key in moved]


HEADER = "chip model dtype t start direction floor/MB moved/MB ratio temp/MB XLA-moved/MB ratio temp/MB".split()
ROW = "{:5}{:13}{:10}{:>6}  {:7}{:10}{:>9}{:>10}{:>7}{:>9}{:>14}{:>8}{:>9}"


def columns(result: dict[str, Any] | None) -> list[str]:
    """Of one implementation: bytes moved, their ratio to the floor, temporary memory."""
    if result is None:
        return ["", "", ""]
    if not result["compiled"]:
        return ["no", "", ""]
    return [f"{result['bytes'] / 1e6:.1f}", f"{result['ratio']:.2f}", f"{result['temp_bytes'] / 1e6:.1f}"]


def table(everything: bool = False) -> list[dict[str, Any]]:
    """All rows, printed as they are found; with `everything` plain XLA on all chips, at all lengths."""
    rows = []
    print(ROW.format(*HEADER))
    for case in itertools.product(CHIPS, RELEASED, DTYPES, LENGTHS, STARTS):
        baseline = everything or (case[0], *case[3:]) == ("v5e", 4096, "zeros")
        for row in measure(*case, ("pallas", "xla") if baseline else ("pallas",)):
            rows.append(row)
            numbers = [f"{row['floor_bytes'] / 1e6:.1f}", *columns(row["pallas"]), *columns(row.get("xla"))]
            print(ROW.format(*case, row["direction"], *numbers), flush=True)
    return rows


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="plain XLA on all chips, at all lengths")
    everything = parser.parse_args().all
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("The TPU compiler is missing: pip install 'zamba2-jax[tpu]'")
    use_cpu()
    use_absent_tpus()
    save_results(__file__, table(everything))


if __name__ == "__main__":
    main()
