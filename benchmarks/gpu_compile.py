"""What becomes of the scan, the decode step and the shared attention on NVIDIA GPUs, by the compiler, without a GPU?

Compiles for GPUs that are not there, on Linux, and tells

- of every kernel of the scan, how many registers a thread takes, how many bytes of them are spilled to memory, and how
  many warps a multiprocessor then holds at a time: with JAX 0.10, as later ones do not write the kernels' assembly;
- of the scan, by kernels and in plain XLA, the bytes of all operands and results over the fewest possible: inputs and
  cotangents read once, outputs written once. Caches are not modelled: an operand counts once per kernel;
- of the decode step, the operations that are left, and their bytes over those of the state read and written once;
- of attention, the memory it takes besides arguments and results.

Prints tables, writes gpu_compile.json beside this file, and exits with 1 if a kernel of the scan does not compile.

    pip install 'zamba2-jax[gpu]'
    python benchmarks/gpu_compile.py [--gpus H100 A100] [--models zamba2-7b ...] [--tokens 4096]
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import RELEASED, array_bytes, gradient, option_parser, save_results, scan_inputs, scan_sizes
from jax._src import xla_bridge
from jax.experimental import topologies

from zamba2_jax import preset
from zamba2_jax.ops import causal_attention, ssd, ssd_step
from zamba2_jax.plan.hlo import traffic

TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
GPUS = {
    "H100": {
        "name": "NVIDIA H100 80GB HBM3",
        "arch": "sm_90a",
        "major": 9,
        "shared": 233472,
        "optin": 232448,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "bandwidth": 3352320000000,
        "l2": 52428800,
        "memory": 84978434048,
    },
    "A100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "arch": "sm_80",
        "major": 8,
        "shared": 167936,
        "optin": 166912,
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "bandwidth": 2039000000000,
        "l2": 41943040,
        "memory": 85899345920,
    },
}
REGISTERS, WARP, LONGEST = 65536, 32, 64  # of a multiprocessor; threads of a warp; warps that it holds at most
ATTENTION_TOKENS, DECODE_ROWS = 8192, 8


def find_plugin() -> None:
    """Makes JAX know of CUDA, on the CPU."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask for its version
    xla_bridge.backends()  # registers the plugin
    # JAX asks which GPU backend is there to tell "cuda" from "rocm"; none is.
    known = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("gpu", "cuda") else known(name)


def sharding_on(gpu: str) -> jax.sharding.Sharding:
    """Of arrays on one such GPU."""
    target = TARGET.format(**GPUS[gpu])
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=target)
    return jax.NamedSharding(topologies.make_mesh(topology, (1,), ("one",)), jax.P())


def compiled(function: Callable[..., Any], arguments: Any, sharding: Any, **options: Any) -> Any:
    """The program for a GPU, of arguments of these shapes and dtypes."""
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    kind = sharding.mesh.devices.flat[0].device_kind
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=options)


@cache
def ptxas() -> str:
    """NVIDIA's assembler, as the `gpu` extra brings it along."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found = [path for place in places for path in Path(place).glob("*/bin/ptxas")]
    if not found:
        sys.exit("The GPU compiler is missing: pip install 'zamba2-jax[gpu]'")
    return str(found[0])


def demands(folder: str, arch: str) -> dict[str, dict[str, int]]:
    """Of every kernel of the scan among the assembly in `folder`: registers, spilled bytes, threads, resident warps."""
    found = {}
    for path in Path(folder).glob("*.ptx"):
        text = path.read_text()
        if not (entry := re.search(r"\.entry (ssd_\w+?)(__\d+)?\(", text)):
            continue
        command = [ptxas(), "-v", f"-arch={arch}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
        kernel = {name: int(re.findall(pattern, report)[0]) for name, pattern in patterns.items()}
        kernel["threads"] = int(re.findall(r"\.reqntid (\d+)", text)[0])
        kernel["warps"] = resident_warps(kernel["registers"], kernel["threads"] // WARP)
        found[entry[1]] = max(kernel, found.get(entry[1], kernel), key=lambda k: (k["spilled"], k["registers"]))
    return found


def resident_warps(registers: int, warps: int) -> int:
    """Warps of programs of so many that a multiprocessor has registers for, which it hands out by 256 per warp."""
    per_program = -(-registers * WARP // 256) * 256 * warps
    return min(REGISTERS // per_program * warps, LONGEST)


def scan_case(gpu: str, sharding: Any, model: str, dtype: str, tokens: int) -> dict[str, Any]:
    """One row of the table of the scan: one row of `tokens`, forward and the gradient."""
    by_name = jax.eval_shape(partial(scan_inputs, 1, tokens, scan_sizes(model), dtype))
    inputs = tuple(by_name[name] for name in ("x", "dt", "A", "B", "C", "D"))
    results = jax.eval_shape(partial(ssd, implementation="xla"), *inputs)
    floors = {"forward": array_bytes((inputs, results)), "gradient": array_bytes((inputs, results, inputs))}
    row: dict[str, Any] = {"gpu": gpu, "model": model, "dtype": dtype, "tokens": tokens, "floor_bytes": floors}
    with tempfile.TemporaryDirectory() as folder:
        for implementation in ("pallas_gpu", "xla"):
            scan = partial(ssd, implementation=implementation)
            forward = compiled(scan, inputs, sharding, xla_dump_to=folder)
            back = compiled(gradient(scan), (inputs, results), sharding, xla_dump_to=folder)
            texts = {"forward": forward.as_text(), "gradient": back.as_text()}
            row[implementation] = {key: round(traffic(text).memory / floors[key], 2) for key, text in texts.items()}
        row["kernels"] = demands(folder, GPUS[gpu]["arch"])
    return row


def decode_case(gpu: str, sharding: Any, model: str) -> dict[str, Any]:
    """One token of several rows: what is left of `ssd_step`."""
    sizes, b = scan_sizes(model), DECODE_ROWS

    def arguments() -> tuple[Any, ...]:
        x, dt, A, B, C, D = scan_inputs(b, 1, sizes, "bfloat16").values()
        return x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, jnp.zeros((b, sizes.h, sizes.p, sizes.n))

    def step(x, dt, A, B, C, D, state):
        return ssd_step(x, dt, A, B, C, D, state=state)

    inputs = jax.eval_shape(arguments)
    text = compiled(step, inputs, sharding).as_text()
    line = re.compile(r"^ +%(\S+) = .* (?:fusion|custom-call|copy|transpose)\(", re.MULTILINE)
    operations = line.findall(text[text.index("\nENTRY") :])
    ratio = round(traffic(text).memory / (2 * array_bytes(inputs[-1])), 3)
    return {"gpu": gpu, "model": model, "rows": b, "operations": operations, "ratio": ratio}


def attention_case(gpu: str, sharding: Any, model: str) -> dict[str, Any]:
    """MB besides arguments and results, forward and with the gradient."""
    config = preset(model)
    shape = 1, ATTENTION_TOKENS, config.attention_heads, config.attention_head_dim
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    attend = partial(causal_attention, scale=1.0, implementation="xla")

    programs = (
        compiled(attend, (q, q, q), sharding),
        compiled(gradient(attend), ((q, q, q), q), sharding),
    )
    forward, back = (round(program.memory_analysis().temp_size_in_bytes / 1e6) for program in programs)
    return {"gpu": gpu, "model": model, "head_dim": shape[-1], "forward_MB": forward, "gradient_MB": back}


def main() -> int:
    """Prints the tables and writes them."""
    parser = option_parser(__doc__)
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--models", nargs="+", default=RELEASED)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    ptxas()
    find_plugin()
    results: dict[str, list[Any]] = {"scan": [], "decode": [], "attention": []}
    failed = False
    for gpu in options.gpus:
        sharding = sharding_on(gpu)
        print(f"{gpu}, {options.tokens} tokens: bytes over the fewest; per kernel registers, spilled bytes, warps")
        for model, dtype in itertools.product(options.models, ("bfloat16", "float32")):
            try:
                row = scan_case(gpu, sharding, model, dtype, options.tokens)
            except jax.errors.JaxRuntimeError as error:
                failed = True
                print(f"  {model} {dtype}: {str(error).splitlines()[0]}", flush=True)
                continue
            results["scan"].append(row)
            for name in ("pallas_gpu", "xla"):
                print(f"  {model} {dtype} {name}: forward {row[name]['forward']}, gradient {row[name]['gradient']}")
            for name, kernel in sorted(row["kernels"].items()):
                print(f"    {name:14}{kernel['registers']:5}{kernel['spilled']:6}{kernel['warps']:4}", flush=True)
        for model in options.models:
            results["decode"].append(decode := decode_case(gpu, sharding, model))
            results["attention"].append(memory := attention_case(gpu, sharding, model))
            print(f"  {model} decode: {' '.join(decode['operations'])}, {decode['ratio']} of the state's bytes")
            print(
                f"  {model} attention: {memory['forward_MB']} MB, {memory['gradient_MB']} MB with the gradient",
                flush=True,
            )
    save_results(__file__, results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
