"""Causal attention by the splash kernels that come with JAX, for TPUs.

Of the two TPU kernels in JAX, flash attention refuses head dims above 128 that are not multiples of it, such as 160 and
224. Splash attention takes them as they are.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from zamba2_jax.typing import Array, Float, Int

LANES = 128
BLOCK = 512  # at 1024 the backward kernels of float32 do not fit the scoped memory of a v5e


def attention_splash(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    tags: Int[Array, "b t"] | None,
    scale: float,
    window: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h p"]:
    """Softmax attention of every token to itself and those before it; with tags, only to those with its own.

    Differentiable once, in reverse. In bfloat16 a scale that is no power of 2 is rounded with q.

    Args:
        q, k, v: bfloat16 or float32; query head i reads key head i // (h / kv).
        tags: not negative.
        scale: factor on the scores.
        window: tokens that a token sees at most, itself and those just before it; all by default.
        interpret: runs on any platform, slowly.

    Raises:
        ValueError: another dtype.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q has dtype {q.dtype}, expected bfloat16 or float32")
    t, h = q.shape[1:3]
    block = min(BLOCK, -(-t // LANES) * LANES)
    padding = -t % block
    q, k, v = (_pad(x, padding).swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    shape, masks = (t + padding, t + padding), splash_attention_mask
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    attend = splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if tags is None:
        out = jax.vmap(attend)(q, k, v)
    else:
        tags = jnp.pad(tags, ((0, 0), (0, padding)), constant_values=-1)
        out = jax.vmap(attend)(q, k, v, splash_attention_kernel.SegmentIds(tags, tags))
    return out.swapaxes(1, 2)[:, :t]


def _pad(array: Float[Array, "b t h p"], padding: int) -> Float[Array, "b s h p"]:
    return jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
