"""The compiled programs that one run of the tests leaves to the next, whatever clone it is of.

JAX's key of a program holds all that it depends on: its operations, the options of the compiler, the version of jaxlib
and what the processor can do.
"""

import os
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zamba2-jax" / "tests"
CACHE_BYTES = 2**30
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Without the emitters of fusions, and in one piece, programs are generated in two thirds of the time.
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def shrink(directory, limit):
    """Removes the files of a directory that were used longest ago, until the rest have at most `limit` bytes.

    JAX's own limit, `jax_compilation_cache_max_size`, reads the times of all programs whenever it writes one; once a
    process was killed between a program and its time, it writes no more. Other runs may be reading and writing
    meanwhile: what they do not find they compile.
    """
    used = []
    for path in directory.glob("*") if directory.is_dir() else ():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
