"""Training runs small enough to make many of."""

import json

import numpy as np

from zamba2_jax.text.vocabulary import save_tokenizer, train_tokenizer
from zamba2_jax.train.config import RunConfig, from_table

# One hybrid layer; what eight devices divide along any one axis.
ARCHITECTURE = {
    "hidden_size": 16,
    "num_layers": 1,
    "hybrid_layer_ids": [0],
    "mamba_heads": 8,
    "d_state": 6,
    "attention_heads": 8,
    "kv_heads": 8,
    "ffn_size": 24,
    "vocab_size": 320,
    "adapter_rank": 4,
}


def table(path, **changes):
    """A run in `path`/run on texts and a tokenizer beside it, which are made if they are not there; as for TOML."""
    if not (path / "tokenizer").is_dir():
        random = np.random.default_rng(0)
        words = ["".join(random.choice(list("abcdefgh"), size)) for size in random.integers(2, 9, 60)]
        for name, count in (("a", 40), ("b", 25), ("unseen", 9)):
            lines = [" ".join(random.choice(words, random.integers(3, 30))) for _ in range(count)]
            (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        (path / "tokenizer").mkdir()
        save_tokenizer(train_tokenizer([" ".join(words)] * 3, 320), path / "tokenizer")
    sources = {name: {"kind": "jsonl", "path": str(path / f"{name}.jsonl")} for name in ("a", "b", "unseen")}
    values = {
        "directory": str(path / "run"),
        "model": {"architecture": ARCHITECTURE},
        "tokenizer": str(path / "tokenizer"),
        "sources": {name: sources[name] for name in "ab"},
        "phases": [
            {"name": "first", "steps": 7, "shares": {"a": 1.0}, "warmup_steps": 2},
            {"name": "second", "steps": 6, "shares": {"a": 0.5, "b": 0.5}, "decay": "linear"},
        ],
        "learning_rate": 1e-2,
        "batch_size": 8,
        "length": 32,
        "checkpoints": {"every": 4},
        "evaluation": {"every": 5, "sources": {"unseen": sources["unseen"]}},
        "logging": {"every": 3, "tensorboard": False, "health_every": 13},
    }
    return values | changes


def config(path, **changes):
    return from_table(RunConfig, table(path, **changes))


def losses(records):
    return [record["loss"] for record in records if record["kind"] in ("train", "eval")]


TIMES = ("seconds", "waited", "memory")


def numbers(records):
    """What two runs that do the same agree on, to the last bit."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in records
        if record["kind"] != "goodput"
    ]
