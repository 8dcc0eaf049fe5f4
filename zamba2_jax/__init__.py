"""Hybrid language models in JAX: the scans, the shared blocks, and the models they make.

A name is imported with its part of the package when it is first used: `zamba2 --help` waits for no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zamba2_jax.checkpoint import load_hf, save_hf
    from zamba2_jax.evaluate.score import score
    from zamba2_jax.inference.api import generate, stream
    from zamba2_jax.inference.decode import decode_step, prefill
    from zamba2_jax.inference.engine import Completion, Engine, Request, Token
    from zamba2_jax.inference.sampling import Sampling
    from zamba2_jax.interpret.taps import capture, edits_tap, tap_names
    from zamba2_jax.lab.fitting import fit
    from zamba2_jax.lab.result import Outcome, Result
    from zamba2_jax.models.cache import cache_bytes, init_cache
    from zamba2_jax.models.flops import count_flops, count_parameters, match
    from zamba2_jax.models.mamba2.config import Mamba2LMConfig
    from zamba2_jax.models.mamba2.model import Mamba2LM
    from zamba2_jax.models.registry import Family, init_model, preset, presets, read_config, register
    from zamba2_jax.models.transformer.config import LlamaConfig, MistralConfig
    from zamba2_jax.models.transformer.model import Transformer
    from zamba2_jax.models.zamba1.config import Zamba1Config
    from zamba2_jax.models.zamba1.model import Zamba1
    from zamba2_jax.models.zamba2.config import Zamba2Config
    from zamba2_jax.models.zamba2.model import Zamba2
    from zamba2_jax.nn.cache import Cache, fork
    from zamba2_jax.nn.parameter import named_parameters, with_values
    from zamba2_jax.nn.tap import Tap
    from zamba2_jax.ops.backend import Backend, default_backend
    from zamba2_jax.text import load_tokenizer
    from zamba2_jax.train.objectives import next_token_loss

_MODULES = {
    "checkpoint": "load_hf save_hf",
    "evaluate.score": "score",
    "inference.api": "generate stream",
    "inference.decode": "decode_step prefill",
    "inference.engine": "Completion Engine Request Token",
    "inference.sampling": "Sampling",
    "interpret.taps": "capture edits_tap tap_names",
    "lab.fitting": "fit",
    "lab.result": "Outcome Result",
    "models.cache": "cache_bytes init_cache",
    "models.flops": "count_flops count_parameters match",
    "models.mamba2.config": "Mamba2LMConfig",
    "models.mamba2.model": "Mamba2LM",
    "models.registry": "Family init_model preset presets read_config register",
    "models.transformer.config": "LlamaConfig MistralConfig",
    "models.transformer.model": "Transformer",
    "models.zamba1.config": "Zamba1Config",
    "models.zamba1.model": "Zamba1",
    "models.zamba2.config": "Zamba2Config",
    "models.zamba2.model": "Zamba2",
    "nn.cache": "Cache fork",
    "nn.parameter": "named_parameters with_values",
    "nn.tap": "Tap",
    "ops.backend": "Backend default_backend",
    "text": "load_tokenizer",
    "train.objectives": "next_token_loss",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Backend",
    "Cache",
    "Completion",
    "Engine",
    "Family",
    "LlamaConfig",
    "Mamba2LM",
    "Mamba2LMConfig",
    "MistralConfig",
    "Outcome",
    "Request",
    "Result",
    "Sampling",
    "Tap",
    "Token",
    "Transformer",
    "Zamba1",
    "Zamba1Config",
    "Zamba2",
    "Zamba2Config",
    "cache_bytes",
    "capture",
    "count_flops",
    "count_parameters",
    "decode_step",
    "default_backend",
    "edits_tap",
    "fit",
    "fork",
    "generate",
    "init_cache",
    "init_model",
    "load_hf",
    "load_tokenizer",
    "match",
    "named_parameters",
    "next_token_loss",
    "prefill",
    "preset",
    "presets",
    "read_config",
    "register",
    "save_hf",
    "score",
    "stream",
    "tap_names",
    "with_values",
]

if not TYPE_CHECKING:  # to a type checker a name that is not there is a mistake

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
