"""A family that the package does not know: gated linear attention (arXiv:2312.06635), with a decay per head and token.

S_t = a_t S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        y = W_o (norm(o) * silu(W_g x))
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx, struct

from zamba2_jax import Family
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.tensors import Part, Tensor
from zamba2_jax.nn.config import ModelConfig, require_divisor
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.parameter import bias, norm_scale, normal, param
from zamba2_jax.ops.segments import document_index
from zamba2_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(ModelConfig):
    model_type: ClassVar[str] = "test-gla"
    positive_ints: ClassVar[tuple[str, ...]] = (*ModelConfig.positive_ints, "heads")

    heads: int = 4

    def __post_init__(self):
        super().__post_init__()
        require_divisor(self, "heads", "hidden_size", self.hidden_size)

    def mesh_sizes(self):
        return {("heads", "heads"): self.heads, **super().mesh_sizes()}


class GLAState(struct.PyTreeNode):
    S: jax.Array

    def placed(self, rows):
        return self.replace(S=constrain(self.S, rows, "heads", None, None))


class GLALayer(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32):
        d, matrix, wide = config.hidden_size, normal(config.initializer_range), ("inner", "d_model")
        self.config, self.norm, self.out_norm = config, norm_scale(rngs, d, dtype), norm_scale(rngs, d, dtype, "inner")
        self.q, self.k, self.v, self.g = (param(rngs, matrix, (d, d), wide, dtype) for _ in range(4))
        self.decay = param(rngs, matrix, (config.heads, d), ("heads", "d_model"), dtype)
        self.decay_bias = bias(rngs, config.heads, dtype, "heads")
        self.o = param(rngs, matrix, (d, d), ("d_model", "inner"), dtype)

    def __call__(self, h, shared_output, state, context):
        b, t, d = h.shape
        x = context.tap("gla.input", context.backend.rms_norm(h, self.norm[...], self.config.rms_norm_eps))
        q, k, v, g = (linear(x, w, backend=context.backend) for w in (self.q, self.k, self.v, self.g))
        log_decay = jax.nn.log_sigmoid(linear(x, self.decay, self.decay_bias, backend=context.backend) + 3)
        by_time = [y.reshape(b, t, self.config.heads, -1).swapaxes(0, 1) for y in (q, k, v)]
        ids = jnp.ones((b, t), int) if context.segment_ids is None else context.segment_ids
        starts = jnp.diff(document_index(ids), axis=1, prepend=0) > 0
        S = jnp.zeros((b, self.config.heads, d // self.config.heads, d // self.config.heads), h.dtype)

        def step(S, inputs):
            q, k, v, a, real, start = inputs
            S_new = a[..., None, None] * jnp.where(start[:, None, None, None], 0, S) + k[..., None] * v[..., None, :]
            S = jnp.where(real[:, None, None, None], S_new, S)
            return S, jnp.einsum("bhkv,bhk->bhv", S, q)

        rest = jnp.exp(log_decay).swapaxes(0, 1), (ids != 0).T, starts.T
        S, o = jax.lax.scan(step, S if state is None else state.S, (*by_time, *rest))
        o = context.backend.gated_rms_norm(o.swapaxes(0, 1).reshape(b, t, d), g, self.out_norm[...], 1, 1e-5)
        return h + context.tap("gla.output", linear(o, self.o, backend=context.backend)), GLAState(S=S)


class GLA(LanguageModel):
    layer = GLALayer
    mixer_outputs = ("gla.output",)

    @classmethod
    def layer_state(cls, config, layer, batch, capacity, dtype):
        size = config.hidden_size // config.heads
        return GLAState(S=jnp.zeros((batch, config.heads, size, size), dtype))


def tensors(config):
    d, v, h = config.hidden_size, config.vocab_size, config.heads
    shapes = dict.fromkeys("qkvgo", (d, d)) | {"norm": (d,), "out_norm": (d,), "decay": (h, d), "decay_bias": (h,)}
    table = {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in shapes.items()}
    table |= {"embed": (v, d), "norm": (d,)} | ({} if config.tie_embeddings else {"head": (v, d)})
    return [Tensor(f"model.{path}", (), shape, (Part(path, shape[0]),)) for path, shape in table.items()]


def forward_flops(config, length):
    d, layers = config.hidden_size, config.num_layers
    mixing = layers * 4 * d * d // config.heads
    return ForwardFlops(
        {"mixers": PartFlops(layers * 2 * d * (5 * d + config.heads), mixing)}, {"head": 2 * d * config.vocab_size}
    )


FAMILY = Family(
    config=GLAConfig,
    presets={
        "test-gla-tiny": GLAConfig(hidden_size=24, num_layers=3, vocab_size=32, heads=2, max_position_embeddings=64)
    },
    read_json=lambda values: GLAConfig(
        **{key: value for key, value in values.items() if key not in ("model_type", "dtype")}
    ),
    write_json=lambda config: {"model_type": config.model_type, **dataclasses.asdict(config)},
    model=lambda: GLA,
    tensors=tensors,
    ignored=lambda config, name: False,
    forward_flops=forward_flops,
)
