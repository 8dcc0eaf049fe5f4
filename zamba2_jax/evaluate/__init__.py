"""What a trained model does with its parts."""

from zamba2_jax.evaluate.silencing import Necessity, Silenced, necessity, parts

__all__ = ["Necessity", "Silenced", "necessity", "parts"]
