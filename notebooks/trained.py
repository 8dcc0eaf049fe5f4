"""A small hybrid that has learnt to copy, for the notebooks that ask what the parts of a model do.

It is trained in well under a minute, once: the next notebook finds it in the user's cache.
"""

import dataclasses
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import zamba2_jax
from zamba2_jax import Zamba2, load_hf, load_tokenizer, preset, save_hf
from zamba2_jax.data.synthetic import Copying, Synthetic, open_synthetic
from zamba2_jax.files import user_caches
from zamba2_jax.text.tokenizer import Tokenizer
from zamba2_jax.text.vocabulary import save_tokenizer, train_tokenizer
from zamba2_jax.train.loop import make_stages, train
from zamba2_jax.train.patterns import scale_matrices
from zamba2_jax.train.recipe import init_scale, optimizer
from zamba2_jax.train.schedule import Phase, learning_rate
from zamba2_jax.train.step import compile_train_step, init_state

VOCABULARY, LENGTH, STEPS = 270, 48, 220
CONFIG = dataclasses.replace(
    preset("zamba2-nano"),
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_layers=2,
    hybrid_layer_ids=(1,),
    num_shared_blocks=1,
    d_state=8,
    ffn_size=96,
    adapter_rank=4,
)
TASK = Copying(symbols=24, lengths=(2, 20), distinct=True)
"""A string of symbols, a marker, and the string again."""


def copying_model() -> tuple[Zamba2, Tokenizer]:
    """The model of `train_copying_model`, from the user's cache, where it is put if this code has made none before."""
    cache = user_caches() / "notebooks"
    directory = cache / _fingerprint()
    if not directory.exists():
        model, tokenizer = train_copying_model()
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache))
        save_hf(model, scratch)
        save_tokenizer(tokenizer, scratch)
        try:
            scratch.rename(directory)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return load_hf(directory), load_tokenizer(directory)


def copying_task(tokenizer: Tokenizer, **changes: Any) -> Synthetic:
    """`TASK`, with fields changed, in the model's symbols: `ids.symbols` holds the marker, then the others."""
    return open_synthetic(dataclasses.replace(TASK, **changes), tokenizer, vocab_size=VOCABULARY)


def copying_example(tokenizer: Tokenizer, *, length: int, seed: int) -> tuple[list[int], list[int]]:
    """A prompt, which is BOS, a string of so many symbols and the marker; and the string, which is to follow."""
    ids = copying_task(tokenizer).ids
    string = np.random.default_rng(seed).choice(ids.symbols[1:], length, replace=False).tolist()
    return [*ids.frame.begin, *string, int(ids.symbols[0])], string


def train_copying_model() -> tuple[Zamba2, Tokenizer]:
    """Two layers, the second of which calls a shared block, trained as `zamba2 demo` trains, on `TASK` alone."""
    tokenizer = train_tokenizer(["the cat and the hat and the bat " * 3], VOCABULARY)
    phase = Phase(name="copying", steps=STEPS, shares={"copying": 1.0}, warmup_steps=10, decay="linear")
    stages = make_stages([phase], {"copying": copying_task(tokenizer)}, batch_size=8, length=LENGTH, seed=0)
    muon, schedule = optimizer(CONFIG).transformation(), learning_rate([phase], 1.5e-2)
    state = init_state(scale_matrices(Zamba2(CONFIG, rngs=nnx.Rngs(0)), init_scale(CONFIG)), muon)
    step = compile_train_step(state, next(iter(stages[0].batches)), optimizer=muon, schedule=schedule)
    state = train(state, step, stages, held_out={}, log_every=STEPS, eval_every=STEPS, report=lambda record: None)
    return state.model, tokenizer


def _fingerprint() -> str:
    """Of all code that the model comes from."""
    sources = [Path(__file__), *sorted(Path(zamba2_jax.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
