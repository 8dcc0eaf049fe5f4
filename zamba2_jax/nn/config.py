"""What every architecture fixes, and what blocks of a kind read of one: frozen values, checked when they are made.

A config holds what fixes the function a model computes and how it is initialised, and nothing else: no mesh, no dtype,
no kernel choice, no tokenizer. There is no JAX here, so that a command line can read configs at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self


class HybridPlan(NamedTuple):
    """What a hybrid layer calls.

    Attributes:
        call: the hybrid ordinal: hybrid layers before this one. It is also the slot of the call's adapters.
        block: which shared block runs.
    """

    call: int
    block: int


class LayerPlan(NamedTuple):
    """One row of the layer plan.

    Attributes:
        layer: index of the layer.
        hybrid: what the layer calls; None for a plain layer.
    """

    layer: int
    hybrid: HybridPlan | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the architectures of all families have. A family derives its own from it.

    Attributes:
        model_type: of the family, as config.json names it; see `models.registry`.
        vocab_size: tokens v.
        hidden_size: width d of the residual stream.
        num_layers: layers.
        rms_norm_eps: epsilon of the norms on the residual stream.
        tie_embeddings: whether the output head is the embedding.
        initializer_range: standard deviation of the normal initialisation of every matrix.
        max_position_embeddings: the trained context length; nothing in the model stops beyond it.
        pad_token_id, bos_token_id: tokens that fill up and that begin a text.
        eos_token_id: the token that ends a text, or several.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    model_type: ClassVar[str]
    positive_ints: ClassVar[tuple[str, ...]] = ("vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
    """Fields that are integers >= 1."""
    positive_floats: ClassVar[tuple[str, ...]] = ("rms_norm_eps", "initializer_range")
    """Fields that are finite numbers > 0."""
    booleans: ClassVar[tuple[str, ...]] = ("tie_embeddings",)

    hidden_size: int
    num_layers: int
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        for name in self.positive_ints:
            require_positive_int(name, getattr(self, name))
        for name in self.positive_floats:
            value = getattr(self, name)
            require(is_finite(value) and value > 0, name, value, "a finite number > 0")
        for name in self.booleans:
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple)
            valid = value is None or all(self._has_token(id_) for id_ in (value if several else [value]))
            require(valid, name, value, f"None or an id in [0, vocab_size={self.vocab_size})")

    def _has_token(self, id_: object) -> bool:
        return isinstance(id_, int) and is_int(id_) and 0 <= id_ < self.vocab_size

    @cached_property
    def layer_plan(self) -> tuple[LayerPlan, ...]:
        """For each layer in order, what runs there. Model, checkpoint reader and cache all read this table."""
        return tuple(LayerPlan(layer, None) for layer in range(self.num_layers))

    @property
    def hybrid_layers(self) -> tuple[int, ...]:
        """Layers that call a shared block, in order."""
        return tuple(row.layer for row in self.layer_plan if row.hybrid is not None)

    @property
    def num_blocks(self) -> int:
        """Distinct shared blocks."""
        return len({row.hybrid.block for row in self.layer_plan if row.hybrid is not None})

    @property
    def num_calls(self) -> int:
        """How many times a shared block runs: the number of hybrid layers."""
        return len(self.hybrid_layers)

    @property
    def residual_in_fp32(self) -> bool:
        """Whether the residual stream is held in at least float32, whatever the compute dtype is."""
        return False

    def with_num_layers(self, num_layers: int) -> "ModelConfig":
        """The same architecture with another depth.

        Raises:
            ValueError: it is not valid.
        """
        return dataclasses.replace(self, num_layers=num_layers)

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Dimensions that a mesh has to divide: the size by logical axis and name for people."""
        return {("vocab", "vocabulary"): self.vocab_size, ("d_model", "model width"): self.hidden_size}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(ModelConfig):
    """A model of Mamba2 blocks (arXiv:2405.21060).

    Attributes:
        mamba_heads: SSM heads h; `expand * hidden_size` divides among them.
        d_state: SSM state size n, per head channel.
        ngroups: groups g of heads that share one B and one C.
        expand: inner width of a Mamba2 block over `hidden_size`.
        d_conv: taps k of the causal depthwise convolution.
        time_step_limit: range dt is clamped to, after softplus, in a full pass and in a step alike.
        time_step_min, time_step_max, time_step_floor: dt at initialisation is log-uniform in [min, max],
            then at least floor.
        add_bias_linear: biases on the in and out projections.
    """

    positive_ints: ClassVar[tuple[str, ...]] = (
        *ModelConfig.positive_ints,
        *("mamba_heads", "d_state", "ngroups", "expand", "d_conv"),
    )
    positive_floats: ClassVar[tuple[str, ...]] = (
        *ModelConfig.positive_floats,
        *("time_step_min", "time_step_max", "time_step_floor"),
    )
    booleans: ClassVar[tuple[str, ...]] = (*ModelConfig.booleans, "add_bias_linear")

    mamba_heads: int
    d_state: int = 64
    ngroups: int = 1
    expand: int = 2
    d_conv: int = 4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    add_bias_linear: bool = False

    def __post_init__(self) -> None:
        as_tuple(self, "time_step_limit")
        super().__post_init__()
        require_divisor(self, "mamba_heads", "expand * hidden_size", self.inner_size)
        require_divisor(self, "ngroups", "mamba_heads", self.mamba_heads)
        limit = self.time_step_limit
        numbers = len(limit) == 2 and all(isinstance(value, int | float) for value in limit)
        require(numbers and 0 <= limit[0] < limit[1], "time_step_limit", limit, "two numbers, 0 <= low < high")
        low, high = self.time_step_min, self.time_step_max
        require(low <= high, "time_step_min", low, f"at most time_step_max = {high}")

    @property
    def gated_norm_eps(self) -> float:
        """Epsilon of the norm inside a block: a constant of mamba_ssm, where a family does not say otherwise."""
        return 1e-5

    @property
    def use_conv_bias(self) -> bool:
        """Whether the convolutions have biases."""
        return True

    @property
    def inner_size(self) -> int:
        """Width e of the Mamba2 blocks: heads times head dim."""
        return self.expand * self.hidden_size

    @property
    def mamba_head_dim(self) -> int:
        """Channels p of one SSM head."""
        return self.inner_size // self.mamba_heads

    @property
    def bc_size(self) -> int:
        """Channels of B and C together, 2 * ngroups * d_state."""
        return 2 * self.ngroups * self.d_state

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the heads."""
        return {("heads", "Mamba heads"): self.mamba_heads, **super().mesh_sizes()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Config(ModelConfig):
    """A model of Mamba1 blocks (arXiv:2312.00752) with several independent heads.

    Attributes:
        mamba_heads: heads h; `expand * hidden_size` divides among them. Each has its own B, C and dt.
        d_state: SSM state size n, per channel.
        dt_rank: rank of dt before it is projected to the channels; None for hidden_size / 16, rounded up, as it is held
            if it is given as that.
        expand: inner width of a block over `hidden_size`.
        d_conv: taps k of the causal depthwise convolution.
        use_conv_bias: biases of the convolutions.
        use_proj_bias: biases on the in and out projections.
        time_step_min, time_step_max, time_step_floor: dt at initialisation is log-uniform in [min, max],
            then at least floor.
    """

    positive_ints: ClassVar[tuple[str, ...]] = (
        *ModelConfig.positive_ints,
        *("mamba_heads", "d_state", "expand", "d_conv"),
    )
    positive_floats: ClassVar[tuple[str, ...]] = (
        *ModelConfig.positive_floats,
        *("time_step_min", "time_step_max", "time_step_floor"),
    )
    booleans: ClassVar[tuple[str, ...]] = (*ModelConfig.booleans, "use_conv_bias", "use_proj_bias")

    mamba_heads: int
    d_state: int = 16
    dt_rank: int | None = None
    expand: int = 2
    d_conv: int = 4
    use_conv_bias: bool = True
    use_proj_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisor(self, "mamba_heads", "expand * hidden_size", self.inner_size)
        if self.dt_rank is not None:
            require_positive_int("dt_rank", self.dt_rank)
            if self.dt_rank == self._default_rank:
                object.__setattr__(self, "dt_rank", None)
        low, high = self.time_step_min, self.time_step_max
        require(low <= high, "time_step_min", low, f"at most time_step_max = {high}")

    @property
    def _default_rank(self) -> int:
        return -(-self.hidden_size // 16)

    @property
    def inner_size(self) -> int:
        """Width e of the blocks: heads times head dim."""
        return self.expand * self.hidden_size

    @property
    def mamba_head_dim(self) -> int:
        """Channels p of one head."""
        return self.inner_size // self.mamba_heads

    @property
    def time_step_rank(self) -> int:
        """Numbers that dt of all channels of a head is projected from."""
        return self._default_rank if self.dt_rank is None else self.dt_rank

    @property
    def x_proj_size(self) -> int:
        """What a head's x is projected to: the numbers behind dt, B and C."""
        return self.time_step_rank + 2 * self.d_state

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the channels."""
        return {("channels", "Mamba channels"): self.inner_size, **super().mesh_sizes()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(ModelConfig):
    """A model in which some layers call shared transformer blocks on [residual, embedding].

    Attributes:
        hybrid_layer_ids: layers whose mixer's input also gets the output of a shared block, ascending; may be empty.
        num_shared_blocks: distinct shared blocks, used in turn (ABAB...); 0 where no layer calls one.
        attention_heads, kv_heads: query heads and key/value heads of a shared block.
        ffn_size: width f of the gated MLP of a shared block.
    """

    hybrid_layer_ids: tuple[int, ...]
    attention_heads: int
    kv_heads: int
    ffn_size: int
    num_shared_blocks: int = 1

    def __post_init__(self) -> None:
        as_tuple(self, "hybrid_layer_ids")
        super().__post_init__()
        ids, blocks = self.hybrid_layer_ids, self.num_shared_blocks
        require(is_int(blocks) and blocks >= 0, "num_shared_blocks", blocks, "an integer >= 0")
        in_range = all(is_int(i) and 0 <= i < self.num_layers for i in ids)
        require(in_range, "hybrid_layer_ids", ids, f"layer ids in [0, num_layers={self.num_layers})")
        require(list(ids) == sorted(set(ids)), "hybrid_layer_ids", ids, "strictly ascending")
        require(blocks <= len(ids), "num_shared_blocks", blocks, f"at most the number of hybrid layers, {len(ids)}")
        require(blocks >= 1 or not ids, "num_shared_blocks", blocks, f"at least 1, as hybrid_layer_ids={ids}")
        require_divisor(self, "attention_heads", "2 * hidden_size", self.attention_size)
        require_divisor(self, "kv_heads", "attention_heads", self.attention_heads)

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

    @property
    def rotary_base(self) -> float | None:
        """Base of the rotary frequencies of the shared attention; None where q and k are not rotated."""
        return None

    @property
    def adapter_rank(self) -> int:
        """Rank of every per-call adapter; 0 for no adapters."""
        return 0

    @property
    def attention_adapters(self) -> bool:
        """Whether q, k and v have adapters, as the MLP has."""
        return False

    @property
    def shared_mlp_bias(self) -> bool:
        """Whether the MLP of a shared block has biases."""
        return False

    @cached_property
    def layer_plan(self) -> tuple[LayerPlan, ...]:
        """For each layer in order, what runs there; call i is of block `i % num_shared_blocks`."""
        hybrids = {
            layer: HybridPlan(call, call % self.num_shared_blocks) for call, layer in enumerate(self.hybrid_layer_ids)
        }
        return tuple(LayerPlan(layer, hybrids.get(layer)) for layer in range(self.num_layers))

    def with_num_layers(self, num_layers: int) -> Self:
        """With another depth: hybrid layers beyond it go; further ones come as far apart as the last two are."""
        ids = [layer for layer in self.hybrid_layer_ids if layer < num_layers]
        apart = self.hybrid_layer_ids[-1] - self.hybrid_layer_ids[-2] if self.num_calls > 1 else self.num_layers
        if self.hybrid_layer_ids and num_layers > self.num_layers:
            ids += range(ids[-1] + apart, num_layers, apart)
        blocks = min(self.num_shared_blocks, len(ids))
        return dataclasses.replace(self, num_layers=num_layers, hybrid_layer_ids=tuple(ids), num_shared_blocks=blocks)

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the heads and widths of the shared blocks."""
        sizes = {**super().mesh_sizes()}
        if self.num_calls:
            sizes[("attention_heads", "attention heads")] = self.attention_heads
            sizes[("attention_heads", "key heads")] = self.kv_heads
            sizes[("ffn", "FFN width")] = self.ffn_size
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies scaled for a longer context, as Llama 3.1 does ("llama3" in transformers).

    A frequency turns n = original_max_position_embeddings / wavelength times in the original context. One with n above
    `high_freq_factor` stays as it is, one with n below `low_freq_factor` is divided by `factor`, and in between the two
    are mixed, linearly in n.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            require(is_finite(value) and value > 0, name, value, "a finite number > 0")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, "low_freq_factor", low, f"less than high_freq_factor = {high}")
        require_positive_int("original_max_position_embeddings", self.original_max_position_embeddings)

    def scaled(self, frequency: float) -> float:
        """A frequency, in radians per token, as it is used."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(ModelConfig):
    """A model of attention layers.

    Attributes:
        attention_heads, kv_heads: query heads, and the heads of keys and values, each of which serves as many of them.
        head_dim: channels p of a head; None for hidden_size / attention_heads, as it is held if it is given as that.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how these are scaled; not by default.
        sliding_window: tokens that a token sees at most, itself and those just before it; all by default.
        attention_bias: biases on the projections to q, k and v and on the one from the heads.
    """

    positive_ints: ClassVar[tuple[str, ...]] = (*ModelConfig.positive_ints, "attention_heads", "kv_heads")
    positive_floats: ClassVar[tuple[str, ...]] = (*ModelConfig.positive_floats, "rope_theta")
    booleans: ClassVar[tuple[str, ...]] = (*ModelConfig.booleans, "attention_bias")

    attention_heads: int
    kv_heads: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = self.rope_scaling
        if isinstance(scaling, Mapping):
            names = [field.name for field in dataclasses.fields(RopeScaling)]
            require(set(scaling) == set(names), "rope_scaling", dict(scaling), f"a table of {', '.join(names)}")
            scaling = RopeScaling(**scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        require(scaling is None or isinstance(scaling, RopeScaling), "rope_scaling", scaling, "None or a RopeScaling")
        for name in ("head_dim", "sliding_window"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        require_divisor(self, "kv_heads", "attention_heads", self.attention_heads)
        if self.head_dim is None:
            require_divisor(self, "attention_heads", "hidden_size, as there is no head_dim,", self.hidden_size)
        elif self.head_dim * self.attention_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", None)
        even = self.attention_head_dim % 2 == 0
        require(even, "head_dim", self.attention_head_dim, "an even number, as heads are rotated")

    @property
    def attention_head_dim(self) -> int:
        """Channels p of one attention head."""
        return self.hidden_size // self.attention_heads if self.head_dim is None else self.head_dim

    @property
    def attention_size(self) -> int:
        """Width of the queries of all heads."""
        return self.attention_heads * self.attention_head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.attention_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores, head_dim^-0.5."""
        return self.attention_head_dim**-0.5

    @cached_property
    def rope_frequencies(self) -> tuple[float, ...]:
        """Radians per token by which each pair of channels of a head is rotated."""
        p = self.attention_head_dim
        plain = [self.rope_theta ** (-2 * i / p) for i in range(p // 2)]
        return tuple(plain if self.rope_scaling is None else map(self.rope_scaling.scaled, plain))

    def mesh_sizes(self) -> Mapping[tuple[str, str], int]:
        """Also the heads of attention."""
        heads = {"attention heads": self.attention_heads, "key heads": self.kv_heads}
        return {**{("attention_heads", name): size for name, size in heads.items()}, **super().mesh_sizes()}


def require(valid: bool, field: str, value: object, rule: str) -> None:
    """A rule of a config.

    Raises:
        ValueError: it is broken; the message names all three.
    """
    if not valid:
        raise ValueError(f"{field}={value!r}: expected {rule}")


def require_positive_int(field: str, value: Any) -> None:
    """`require` for an integer >= 1."""
    require(is_int(value) and value >= 1, field, value, "an integer >= 1")


def require_divisor(config: ModelConfig, field: str, whole: str, size: int) -> None:
    """`require` for a divisor of another size."""
    value = getattr(config, field)
    require(size % value == 0, field, value, f"a divisor of {whole} = {size}")


def as_tuple(config: ModelConfig, field: str) -> None:
    """Makes a field that is a list a tuple, which hashes.

    Raises:
        ValueError: it is neither.
    """
    value = getattr(config, field)
    require(isinstance(value, list | tuple), field, value, "a tuple")
    object.__setattr__(config, field, tuple(value))


def is_int(value: object) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
