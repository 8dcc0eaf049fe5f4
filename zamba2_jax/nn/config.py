"""What every architecture fixes, and what Mamba2 blocks read of one: frozen values, checked when they are made.

A config holds what fixes the function a model computes and how it is initialised, and nothing else: no mesh, no dtype,
no kernel choice, no tokenizer. There is no JAX here, so that a command line can read configs at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple


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
