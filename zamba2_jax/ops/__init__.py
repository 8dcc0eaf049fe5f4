"""Pure functions of arrays: what the model is made of. Sizes come from shapes; there is no config here."""

from zamba2_jax.ops.attention import cached_attention, causal_attention, window_attention
from zamba2_jax.ops.conv import causal_conv1d, causal_conv1d_step
from zamba2_jax.ops.cross_entropy import cross_entropy, predictions
from zamba2_jax.ops.embedding import embed
from zamba2_jax.ops.glu import geglu, swiglu
from zamba2_jax.ops.linear import linear
from zamba2_jax.ops.norm import gated_rms_norm, rms_norm
from zamba2_jax.ops.rope import rotate
from zamba2_jax.ops.segments import document_index, document_positions
from zamba2_jax.ops.selective_scan import selective_scan, selective_scan_step
from zamba2_jax.ops.ssd import ssd, ssd_step
from zamba2_jax.ops.ssd_reference import ssd_associative, ssd_sequential

__all__ = [
    "cached_attention",
    "causal_attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_entropy",
    "document_index",
    "document_positions",
    "embed",
    "gated_rms_norm",
    "geglu",
    "linear",
    "predictions",
    "rms_norm",
    "rotate",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_associative",
    "ssd_sequential",
    "ssd_step",
    "swiglu",
    "window_attention",
]
