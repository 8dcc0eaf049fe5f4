"""Zamba2 in JAX: pure functions for the Mamba2 scan and the shared attention, and the model they make."""

from zamba2_jax.checkpoint import load_hf, save_hf
from zamba2_jax.config import Zamba2Config
from zamba2_jax.generate import decode_step, generate, prefill
from zamba2_jax.model import Cache, Zamba2, capture, init_cache, next_token_loss, tap_names

__all__ = [
    "Cache",
    "Zamba2",
    "Zamba2Config",
    "capture",
    "decode_step",
    "generate",
    "init_cache",
    "load_hf",
    "next_token_loss",
    "prefill",
    "save_hf",
    "tap_names",
]
