"""Zamba2: a stack of Mamba2 layers, and shared transformer blocks that some of them call."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.cache import Cache, KVCache, MambaState, placed
from zamba2_jax.model.divided import embed, row_axes
from zamba2_jax.model.mamba import MambaLayer
from zamba2_jax.model.parameter import KeyStream, describe, norm_scale, normal, param
from zamba2_jax.model.shared import SharedBlock, SharedCall
from zamba2_jax.model.tap import Tap, no_tap, scoped
from zamba2_jax.ops.linear import linear
from zamba2_jax.ops.norm import rms_norm
from zamba2_jax.ops.segments import document_positions
from zamba2_jax.ops.ssd import Implementation
from zamba2_jax.sharding import constrain
from zamba2_jax.typing import Array, DTypeLike, Float, Int

_Mixed = tuple[Array, MambaState]


class Zamba2(nnx.Module):
    """Zamba2 (arXiv:2411.15242), a pytree of its parameters: it goes through `jax.jit`, `jax.grad` and `optax`.

    Where optax takes a tree or a function that makes one, as for the labels of `optax.multi_transform`, give it the
    function, `lambda model: labels`: a tree of labels made from a model is a `Zamba2` too, which optax would call.

    Attributes:
        config: the architecture.
        embed: the token embedding, [v, d].
        layers: one `MambaLayer` per layer.
        shared: the shared blocks, each stored once; `config.layer_plan` says which layer calls which.
        calls: one `SharedCall` per call of a shared block.
        norm: scale of the final norm.
        head: the output head, [v, d]; None where it is tied to `embed`.
    """

    def __init__(self, config: Zamba2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        """A model with fresh parameters of compute dtype `dtype`, on the mesh that is set, if one is.

        Make it outside of `jax.jit`, where the programs of all parameters would be one that takes minutes to compile.
        `jax.eval_shape(lambda: Zamba2(config, rngs=nnx.Rngs(0)))` gives the same pytree of shapes, without memory.
        """
        v, d, matrix = config.vocab_size, config.hidden_size, normal(config.initializer_range)
        keys = KeyStream(rngs.params())
        self.config = config
        self.embed = param(keys, matrix, (v, d), ("vocab", "d_model"), dtype)
        self.layers = nnx.List([MambaLayer(config, rngs=keys, dtype=dtype) for _ in range(config.num_layers)])
        self.shared = nnx.List([SharedBlock(config, rngs=keys, dtype=dtype) for _ in range(config.num_shared_blocks)])
        self.calls = nnx.List([SharedCall(config, rngs=keys, dtype=dtype) for _ in range(config.num_calls)])
        self.norm = norm_scale(keys, d, dtype)
        self.head = None if config.tie_embeddings else param(keys, matrix, (v, d), ("vocab", "d_model"), dtype)

    def __repr__(self) -> str:
        """On a page: the architecture, and a line for each kind of parameter."""
        return "\n".join([f"Zamba2({self.config},", *(f"  {line}" for line in describe(self)), ")"])

    __str__ = __repr__

    def __call__(
        self,
        tokens: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        inputs_embeds: Float[Array, "b t d"] | None = None,
        tap: Tap = no_tap,
        implementation: Implementation | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of the next token, at every token.

        Args:
            tokens: ids in [0, v).
            segment_ids: documents packed in a row, 0 for padding at either end; see `ops.segments`. A document's
                logits are those it has alone in its row.
            positions: for the rotary embedding; counted from 0 in each document by default.
            inputs_embeds: in place of tokens, what they are embedded as.
            tap: sees and may change every named value inside; see `model.tap`.
            implementation: of the scan; see `ops.ssd`.

        Raises:
            ValueError: both or neither of tokens and inputs_embeds are given.
        """
        h = self.hidden_states(
            tokens, segment_ids, positions, inputs_embeds=inputs_embeds, tap=tap, implementation=implementation
        )[0]
        return tap("logits", self.logits(h))

    def hidden_states(
        self,
        tokens: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        inputs_embeds: Float[Array, "b t d"] | None = None,
        cache: Cache | None = None,
        tap: Tap = no_tap,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """What the output head reads: the final norm's output; and the cache, if one is given, after the tokens.

        Arguments as in `__call__`. With a cache the rows go on where it stands: segment_ids then marks padding at the
        end of a row (0) and nothing else, and positions follow from the cache.
        """
        if tokens is not None and inputs_embeds is None:
            embedded = embed(tokens, self.embed[...], cached=cache is not None)
        elif tokens is None and inputs_embeds is not None:
            embedded = inputs_embeds
        else:
            raise ValueError("expected either tokens or inputs_embeds, and not both")
        embedded = tap("embed", embedded)
        if cache is not None:
            positions = cache.lengths[:, None] + jnp.arange(embedded.shape[1])
        elif positions is None:
            positions = default_positions(embedded, segment_ids)

        def mix(layer: MambaLayer, h: Array, given: Array | None, state: MambaState | None, tap: Tap) -> _Mixed:
            return layer(h, given, state, segment_ids, tap=tap, implementation=implementation)

        h, states, kv_caches = self._run(embedded, positions, segment_ids, cache, mix, tap)
        if cache is not None:
            added = embedded.shape[1] if segment_ids is None else (segment_ids != 0).sum(axis=1, dtype=jnp.int32)
            cache = placed(Cache(states, kv_caches, cache.lengths + added))
        return h, cache

    def step(self, tokens: Int[Array, " b"], cache: Cache, *, tap: Tap = no_tap) -> tuple[Float[Array, "b v"], Cache]:
        """Logits after one more token in every row, and the cache with it."""

        def mix(layer: MambaLayer, h: Array, given: Array | None, state: MambaState | None, tap: Tap) -> _Mixed:
            assert state is not None
            return layer.step(h, given, state, tap=tap)

        embedded = tap("embed", embed(tokens[:, None], self.embed[...], cached=True))
        h, states, kv_caches = self._run(embedded, cache.lengths[:, None], None, cache, mix, tap)
        return tap("logits", self.logits(h[:, 0])), placed(Cache(states, kv_caches, cache.lengths + 1))

    def _run(
        self,
        embedded: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        cache: Cache | None,
        mix: Callable[[MambaLayer, Array, Array | None, MambaState | None, Tap], _Mixed],
        tap: Tap,
    ) -> tuple[Float[Array, "b t d"], tuple[MambaState, ...], tuple[KVCache, ...]]:
        """All layers and the final norm; `mix` runs a Mamba2 layer, on whole rows or on one token of each."""
        rows = row_axes(len(embedded), cached=cache is not None)
        h, states, kv_caches = constrain(embedded, *rows, None), [], []
        projected = [block.project_embedded(embedded) for block in self.shared]
        for row, layer in zip(self.config.layer_plan, self.layers, strict=True):
            at = scoped(tap, f"layers.{row.layer}")
            h, given = at("input", h), None
            if row.hybrid is not None:
                block, call = self.shared[row.hybrid.block], self.calls[row.hybrid.call]
                kv = None if cache is None else cache.attention[row.hybrid.call]
                once, of_call = projected[row.hybrid.block], scoped(at, "shared")
                given, kv = block(h, embedded, once, call, positions, segment_ids, kv, tap=of_call)
                if kv is not None:
                    kv_caches.append(kv)
            state = None if cache is None else cache.mamba[row.layer]
            h, state = mix(layer, h, given, state, at)
            h = at("output", constrain(h, *rows, None))
            states.append(state)
        h = tap("final_norm", rms_norm(h, self.norm[...], self.config.rms_norm_eps))
        return h, tuple(states), tuple(kv_caches)

    def logits(self, h: Float[Array, "*batch d"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch v"]:
        """The output head on the final norm's output; in `dtype`, by default that of h."""
        return linear(h, self.output_matrix, dtype=dtype)

    @property
    def output_matrix(self) -> Float[Array, "v d"]:
        """The matrix of the output head, tied or not."""
        return (self.embed if self.head is None else self.head)[...]

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype: that of the weight matrices."""
        return self.embed.dtype


def default_positions(embedded: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None) -> Int[Array, "b t"]:
    """Positions of the tokens, counted from 0 in each document."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(embedded.shape[1]), embedded.shape[:2])
    return document_positions(constrain(segment_ids, "batch", None))
