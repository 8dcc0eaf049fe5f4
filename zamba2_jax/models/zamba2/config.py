"""The architecture of a Zamba2 model, as a frozen value."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from zamba2_jax.nn.config import HybridPlan, LayerPlan, Mamba2Config, as_tuple, is_int, require, require_divisor

LONG_CONTEXT = 16384
"""Context length of the long-context variants."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config(Mamba2Config):
    """Architecture of Zamba2 (arXiv:2411.15242).

    Attributes:
        hidden_size: width d of the residual stream; the shared blocks see 2d, [residual, embedding].
        hybrid_layer_ids: layers whose Mamba2 input also gets the output of a shared block, ascending; may be empty.
        num_shared_blocks: distinct shared blocks, used in turn (ABAB...); 0 where no layer calls one.
        attention_heads, kv_heads: query heads and key/value heads of a shared block.
        ffn_size: width f of the gated MLP of a shared block.
        adapter_rank: rank of every per-call adapter; 0 for no adapters.
        attention_adapters: whether q, k and v have adapters, as the MLP has.
        use_rope: whether the shared attention rotates q and k.
        rope_theta: base of the rotary frequencies, as used; see `with_long_context`.
        add_bias_linear: biases on the Mamba2 in and out projections and on the MLP.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    model_type: ClassVar[str] = "zamba2"
    positive_ints: ClassVar[tuple[str, ...]] = (
        *Mamba2Config.positive_ints,
        *("attention_heads", "kv_heads", "ffn_size"),
    )
    positive_floats: ClassVar[tuple[str, ...]] = (*Mamba2Config.positive_floats, "rope_theta")
    booleans: ClassVar[tuple[str, ...]] = (*Mamba2Config.booleans, "attention_adapters", "use_rope")

    hybrid_layer_ids: tuple[int, ...]
    attention_heads: int
    kv_heads: int
    ffn_size: int
    num_shared_blocks: int = 1
    adapter_rank: int = 128
    attention_adapters: bool = False
    use_rope: bool = False
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        as_tuple(self, "hybrid_layer_ids")
        super().__post_init__()
        for name in ("num_shared_blocks", "adapter_rank"):
            value = getattr(self, name)
            require(is_int(value) and value >= 0, name, value, "an integer >= 0")
        ids, blocks = self.hybrid_layer_ids, self.num_shared_blocks
        in_range = all(is_int(i) and 0 <= i < self.num_layers for i in ids)
        require(in_range, "hybrid_layer_ids", ids, f"layer ids in [0, num_layers={self.num_layers})")
        require(list(ids) == sorted(set(ids)), "hybrid_layer_ids", ids, "strictly ascending")
        require(blocks <= len(ids), "num_shared_blocks", blocks, f"at most the number of hybrid layers, {len(ids)}")
        require(blocks >= 1 or not ids, "num_shared_blocks", blocks, f"at least 1, as hybrid_layer_ids={ids}")
        any_rank = self.adapter_rank >= 1 or not self.attention_adapters
        require(any_rank, "adapter_rank", self.adapter_rank, "at least 1 with attention_adapters")
        require_divisor(self, "attention_heads", "2 * hidden_size", self.attention_size)
        require_divisor(self, "kv_heads", "attention_heads", self.attention_heads)
        even = not self.use_rope or self.attention_head_dim % 2 == 0
        rule = f"2 * hidden_size / attention_heads = {self.attention_head_dim} to be even with use_rope"
        require(even, "attention_heads", self.attention_heads, rule)

    @property
    def attention_size(self) -> int:
        """Width of a shared block's input, [residual, embedding], and of its queries."""
        return 2 * self.hidden_size

    @property
    def attention_head_dim(self) -> int:
        """Channels of one attention head."""
        return self.attention_size // self.attention_heads

    @property
    def kv_size(self) -> int:
        """Width of a shared block's keys, and of its values."""
        return self.kv_heads * self.attention_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores, (head_dim / 2)^-0.5: half the input is the embedding."""
        return (self.attention_head_dim / 2) ** -0.5

    @cached_property
    def layer_plan(self) -> tuple[LayerPlan, ...]:
        """For each layer in order, what runs there; call i is of block `i % num_shared_blocks`."""
        hybrids = {
            layer: HybridPlan(call, call % self.num_shared_blocks) for call, layer in enumerate(self.hybrid_layer_ids)
        }
        return tuple(LayerPlan(layer, hybrids.get(layer)) for layer in range(self.num_layers))

    def with_num_layers(self, num_layers: int) -> "Zamba2Config":
        """With another depth: hybrid layers beyond it go; further ones come as far apart as the last two are."""
        ids = [layer for layer in self.hybrid_layer_ids if layer < num_layers]
        apart = self.hybrid_layer_ids[-1] - self.hybrid_layer_ids[-2] if self.num_calls > 1 else self.num_layers
        if self.hybrid_layer_ids and num_layers > self.num_layers:
            ids += range(ids[-1] + apart, num_layers, apart)
        blocks = min(self.num_shared_blocks, len(ids))
        return dataclasses.replace(self, num_layers=num_layers, hybrid_layer_ids=tuple(ids), num_shared_blocks=blocks)

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the heads and widths of the shared blocks and adapters."""
        sizes = {**super().mesh_sizes()}
        if self.num_calls:
            sizes[("attention_heads", "attention heads")] = self.attention_heads
            sizes[("attention_heads", "key heads")] = self.kv_heads
            sizes[("ffn", "FFN width")] = self.ffn_size
        if self.num_calls and self.adapter_rank:
            sizes[("adapter_out", "FFN width")] = self.ffn_size
        if self.num_calls and self.attention_adapters:
            sizes[("adapter_out", "attention width")] = self.attention_size
            sizes[("adapter_out", "key width")] = self.kv_size
        return sizes

    def with_long_context(self) -> "Zamba2Config":
        """The same model with the rotary base of the long-context variant, theta * 8^(D / (D - 2)), D the head dim.

        Apply it once. Zyphra's fork and transformers 4 do the same when `use_long_context` is set;
        transformers 5 keeps the short base.
        """
        head_dim = self.attention_head_dim
        require(head_dim > 2, "attention_heads", self.attention_heads, f"a head dim above 2, not {head_dim}")
        theta = self.rope_theta * long_context_scale(self.attention_head_dim)
        return dataclasses.replace(self, rope_theta=theta, max_position_embeddings=LONG_CONTEXT)


def long_context_scale(head_dim: int) -> float:
    """What the long-context variant multiplies the rotary base by."""
    return float(8.0 ** (head_dim / (head_dim - 2)))
