"""How fast are token files read from an object store, against how fast the nano model trains?

Writes token files, puts them into a server that speaks S3 on this machine, and reads batches through a proxy that holds
every request up by 50 ms: cold, into an empty cache, and again, from the cache. The pipeline must be 5 times as fast as
training, whose speed is taken from data_speed.json. Prints a table and writes storage_speed.json beside this file.

    python benchmarks/storage_speed.py
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
from common import machine, option_parser, save_results, use_cpu
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.storage import s3
from zamba2_jax.data import remote_tokens
from zamba2_jax.data.batches import batches
from zamba2_jax.data.token_files import open_token_files, write_token_files
from zamba2_jax.storage.blocks import Blocks
from zamba2_jax.storage.remote import RemoteDirectory, local_files

DELAY = 0.05
SHAPES = {"4 x 128": (4, 128), "16 x 1024": (16, 1024)}
SECONDS = 10
TOKENS, DOCUMENT, VOCABULARY = 64_000_000, 800, 2048


def write(directory: Path) -> None:
    """Documents of random tokens."""
    random = np.random.default_rng(0)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    sizes = random.geometric(1 / DOCUMENT, TOKENS // DOCUMENT)
    documents = (random.integers(0, VOCABULARY, size, dtype=np.int32) for size in sizes)
    directory.mkdir()
    write_token_files(directory, documents, tokenizer, shard_tokens=2**24)


def feeding(url: str, cache: Path, batch_size: int, length: int) -> tuple[float, float, float]:
    """Seconds to open and to the first batch, and tokens per second from then on."""
    kept = Blocks(cache, 1 << 30)
    remote_tokens.blocks = lambda: kept
    begin = time.perf_counter()
    documents = open_token_files(url, None, vocab_size=VOCABULARY)
    opened = time.perf_counter() - begin
    iterator = iter(batches({"a": documents}, {"a": 1.0}, batch_size=batch_size, length=length, seed=0))
    with contextlib.closing(iterator):
        next(iterator)
        begin = time.perf_counter()
        first, count = begin - opened, 0
        while time.perf_counter() - begin < SECONDS:
            next(iterator)
            count += batch_size * length
        return opened, first, count / (time.perf_counter() - begin)


def main() -> None:
    """Measures, prints and writes."""
    option_parser(__doc__).parse_args()
    use_cpu()
    nano = json.loads((Path(__file__).parent / "data_speed.json").read_text())["train nano, 4 x 128, tokens/s"]
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, s3.server() as port, s3.Proxy(port) as proxy:
        write(Path(name) / "tokens")
        os.environ |= s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        fsspec.filesystem("s3").mkdir("bench")
        RemoteDirectory("s3://bench/tokens").upload(local_files(Path(name) / "tokens"))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        proxy.seconds = DELAY
        for shape, sizes in SHAPES.items():
            for state in ("cold", "warm"):
                opened, _, speed = feeding("s3://bench/tokens", Path(name) / shape, *sizes)
                results[f"open {shape}, {state}, s"] = opened
                results[f"feed {shape}, {state}, tokens/s"] = speed
    for label, value in results.items():
        print(f"{label:32} {value:14,.2f}")
    slowest = min(value for label, value in results.items() if label.startswith("feed"))
    print(f"the slowest is {slowest / nano:.1f} times as fast as training nano at {nano:,.0f} tokens/s")
    save_results(__file__, {"measured on": machine(), **results})


if __name__ == "__main__":
    main()
