"""How fast does the data pipeline feed tokens, against how fast the nano model trains?

Tokenizes the embedded code into token files, with one process and with two, and reads batches from memory and from the
files, in the demo's shape and in that of a large run. Then trains `zamba2-nano` for a few steps on the same machine.
The pipeline must be 5 times as fast as the training. Prints a table and writes data_speed.json beside this file.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/data_speed.py
"""

import contextlib
import itertools
import json
import tempfile
import time
from pathlib import Path

import jax
from common import machine, option_parser, save_results, use_cpu
from flax import nnx

from zamba2_jax import init_model, preset
from zamba2_jax.data.batches import Batch, batches
from zamba2_jax.data.corpus import code, tokenize_embedded_corpus
from zamba2_jax.data.documents import Documents
from zamba2_jax.data.sources import SourceConfig, open_documents, size_of
from zamba2_jax.data.tokenize import tokenize
from zamba2_jax.text.vocabulary import save_tokenizer
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.step import compile_train_step, init_state

SHAPES = {"4 x 128": (4, 128), "64 x 4096": (64, 4096)}
SECONDS = 3
STEPS = 20


def write_corpus(directory: Path) -> None:
    """The embedded code, 5 times, as JSON lines: 10 MB."""
    lines = [json.dumps({"text": document.text}) + "\n" for document in code()]
    with (directory / "code.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(5):
            file.writelines(lines)


def feeding(documents: Documents, batch_size: int, length: int) -> float:
    """Tokens per second that the pipeline gives to a loop that does nothing else."""
    iterator = iter(batches({"a": documents}, {"a": 1.0}, batch_size=batch_size, length=length, seed=0))
    with contextlib.closing(iterator):
        next(iterator)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            next(iterator)
            count += batch_size * length
        return count / (time.perf_counter() - begin)


def training(stream: list[Batch]) -> float:
    """Tokens per second of training steps of the nano model."""
    optimizer = AdamW().transformation()
    state = init_state(init_model(preset("zamba2-nano"), rngs=nnx.Rngs(0)), optimizer)
    step = compile_train_step(state, stream[0], optimizer=optimizer, schedule=lambda step: 1e-3)
    state, _ = jax.block_until_ready(step(state, stream[0]))
    begin = time.perf_counter()
    for batch in stream:
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return len(stream) * stream[0].tokens.size / (time.perf_counter() - begin)


def main() -> None:
    """Measures, prints and writes."""
    option_parser(__doc__).parse_args()
    use_cpu()
    corpus = tokenize_embedded_corpus(preset("zamba2-nano").vocab_size)
    vocab_size = corpus.tokenizer.vocab_size
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_corpus(directory)
        texts = SourceConfig(kind="jsonl", path=str(directory))
        save_tokenizer(corpus.tokenizer, directory)
        for processes in (1, 2):
            output = directory / f"tokens-{processes}"
            begin = time.perf_counter()
            tokenize([texts], output, directory, processes=processes, shard_tokens=2**23, progress=lambda size: None)
            rate = size_of(texts) / (time.perf_counter() - begin)
            results[f"tokenize, {processes} processes, MB/s"] = rate / 1e6
        files = open_documents(SourceConfig(kind="tokens", path=str(output)), corpus.tokenizer, vocab_size=vocab_size)
        for shape, (batch_size, length) in SHAPES.items():
            for place, documents in {"memory": corpus.train["code"], "files": files}.items():
                results[f"feed {shape} from {place}, tokens/s"] = feeding(documents, batch_size, length)
    stream = batches(corpus.train, {"code": 1.0}, batch_size=4, length=128, seed=0)
    results["train nano, 4 x 128, tokens/s"] = trained = training(list(itertools.islice(stream, STEPS)))
    for what, rate in results.items():
        print(f"{what:45} {rate:14,.1f}")
    slowest = min(rate for what, rate in results.items() if what.startswith("feed"))
    print(f"the pipeline at its slowest is {slowest / trained:.0f} times as fast as the training")
    save_results(__file__, {"measured on": machine(), **results})


if __name__ == "__main__":
    main()
