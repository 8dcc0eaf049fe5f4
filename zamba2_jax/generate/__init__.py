"""Running a model on prompts."""

from zamba2_jax.generate.decode import decode_step, generate, prefill

__all__ = ["decode_step", "generate", "prefill"]
