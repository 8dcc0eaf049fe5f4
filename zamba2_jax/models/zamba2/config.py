"""The architecture of a Zamba2 model, as a frozen value."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from zamba2_jax.nn.config import HybridConfig, Mamba2Config, is_int, require

LONG_CONTEXT = 16384
"""Context length of the long-context variants."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config(HybridConfig, Mamba2Config):
    """Architecture of Zamba2 (arXiv:2411.15242).

    Attributes:
        hidden_size: width d of the residual stream; the shared blocks see 2d, [residual, embedding].
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

    adapter_rank: int = 128
    attention_adapters: bool = False
    use_rope: bool = False
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = self.adapter_rank
        require(is_int(rank) and rank >= 0, "adapter_rank", rank, "an integer >= 0")
        require(rank >= 1 or not self.attention_adapters, "adapter_rank", rank, "at least 1 with attention_adapters")
        even = not self.use_rope or self.attention_head_dim % 2 == 0
        rule = f"2 * hidden_size / attention_heads = {self.attention_head_dim} to be even with use_rope"
        require(even, "attention_heads", self.attention_heads, rule)

    @property
    def rotary_base(self) -> float | None:
        """Base of the rotary frequencies of the shared attention; None where q and k are not rotated."""
        return self.rope_theta if self.use_rope else None

    @property
    def shared_mlp_bias(self) -> bool:
        """Whether the MLP of a shared block has biases."""
        return self.add_bias_linear

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the widths of the adapters."""
        sizes = {**super().mesh_sizes()}
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
