"""Zamba2 in JAX: pure functions for the Mamba2 scan and the shared attention, and the model they make."""

from zamba2_jax.checkpoint import load_hf, save_hf
from zamba2_jax.config import Zamba2Config
from zamba2_jax.generate import (
    Completion,
    Engine,
    Request,
    Sampling,
    Token,
    decode_step,
    generate,
    prefill,
    score,
    stream,
)
from zamba2_jax.model import Cache, Zamba2, cache_bytes, capture, fork, init_cache, next_token_loss, tap_names
from zamba2_jax.text import load_tokenizer

__all__ = [
    "Cache",
    "Completion",
    "Engine",
    "Request",
    "Sampling",
    "Token",
    "Zamba2",
    "Zamba2Config",
    "cache_bytes",
    "capture",
    "decode_step",
    "fork",
    "generate",
    "init_cache",
    "load_hf",
    "load_tokenizer",
    "next_token_loss",
    "prefill",
    "save_hf",
    "score",
    "stream",
    "tap_names",
]
