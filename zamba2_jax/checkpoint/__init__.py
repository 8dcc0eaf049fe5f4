"""Reading and writing models."""

from zamba2_jax.checkpoint.hf import load_hf, save_hf

__all__ = ["load_hf", "save_hf"]
