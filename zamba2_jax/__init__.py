"""Zamba2 in JAX: pure functions for the Mamba2 scan and the shared attention, and the model they make.

A name is imported with its part of the package when it is first used: `zamba2 --help` waits for no JAX.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zamba2_jax.checkpoint import load_hf, save_hf
    from zamba2_jax.config import Zamba2Config
    from zamba2_jax.generate.api import generate, stream
    from zamba2_jax.generate.decode import decode_step, prefill
    from zamba2_jax.generate.engine import Completion, Engine, Request, Token
    from zamba2_jax.generate.sampling import Sampling
    from zamba2_jax.generate.score import score
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

_PARTS = {
    "checkpoint": "load_hf save_hf",
    "config": "Zamba2Config",
    "generate": "Completion Engine Request Sampling Token decode_step generate prefill score stream",
    "model": "Cache Zamba2 cache_bytes capture fork init_cache next_token_loss tap_names",
    "text": "load_tokenizer",
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names.split()}

if not TYPE_CHECKING:  # to a type checker a name that is not there is a mistake

    def __getattr__(name: str) -> Any:
        if name not in _PART_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_PART_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, whose name `generate` is the function, although importing a part of it sets it to the part."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "generate" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
