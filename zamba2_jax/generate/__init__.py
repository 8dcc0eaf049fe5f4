"""Running a model on prompts."""

from zamba2_jax.generate.api import generate, stream
from zamba2_jax.generate.decode import decode_step, prefill
from zamba2_jax.generate.engine import Completion, Engine, Prefix, Request, Token
from zamba2_jax.generate.sampling import Sampling
from zamba2_jax.generate.score import score

__all__ = [
    "Completion",
    "Engine",
    "Prefix",
    "Request",
    "Sampling",
    "Token",
    "decode_step",
    "generate",
    "prefill",
    "score",
    "stream",
]
