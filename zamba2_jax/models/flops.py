"""How much arithmetic and how many parameters a model has, and which architecture has as much.

By formula, as the compiler's own count is no use (docs/xla-notes.md: loops-counted-once).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from zamba2_jax.choices import Remat
from zamba2_jax.models.registry import family_of, init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.parameter import named_parameters


class PartFlops(NamedTuple):
    """FLOPs of a part of the layers in a forward pass, per token, over all layers and calls.

    Attributes:
        weights: products with weights.
        mixing: between tokens: convolutions, scans, scores and values of attention.
    """

    weights: int
    mixing: int = 0


class ForwardFlops(NamedTuple):
    """FLOPs of a forward pass per token.

    Attributes:
        layers: by part, of all layers, and of every call of a shared block.
        ends: by part, outside the layers, such as the output head.
    """

    layers: Mapping[str, PartFlops]
    ends: Mapping[str, int]

    @property
    def weights(self) -> int:
        """Products with weights in the layers."""
        return sum(part.weights for part in self.layers.values())

    @property
    def mixing(self) -> int:
        """Between tokens."""
        return sum(part.mixing for part in self.layers.values())

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.mixing + sum(self.ends.values())


def forward_flops(config: ModelConfig, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens; the formulas are those of the family.

    Two for each multiplication and addition, of matrix products and convolutions only. Attention is counted as dense,
    the half that a causal mask hides included (arXiv:2204.02311, appendix B).
    """
    return family_of(config).forward_flops(config, length)


def count_flops(config: ModelConfig, length: int) -> dict[str, int]:
    """`forward_flops` as a number for each part of the model."""
    flops = forward_flops(config, length)
    return {**{name: part.weights + part.mixing for name, part in flops.layers.items()}, **flops.ends}


def prefill_flops(config: ModelConfig, length: int) -> int:
    """FLOPs to the first token of a prompt of `length` tokens: a forward pass with the head at the last token alone."""
    forward = forward_flops(config, length)
    head = forward.ends.get("head", 0)
    return length * (forward.total - head) + head


def step_flops(config: ModelConfig, context: int) -> int:
    """FLOPs of one more token after which a row has `context` tokens.

    Of the parts that a family counts, "attention" is that of a row of so many tokens, and all else of a row of one.
    """
    alone, attention = forward_flops(config, 1), forward_flops(config, context).layers.get("attention", PartFlops(0))
    rest = sum(part.weights + part.mixing for name, part in alone.layers.items() if name != "attention")
    return attention.weights + attention.mixing + rest + sum(alone.ends.values())


def train_flops(config: ModelConfig, length: int) -> int:
    """FLOPs that a training step takes per token: the backward pass is two forward ones; what is recomputed is not."""
    return 3 * forward_flops(config, length).total


def executed_flops(config: ModelConfig, length: int, remat: Remat) -> int:
    """`train_flops` with what is recomputed: what `remat` does not keep."""
    forward = forward_flops(config, length)
    again = {"none": 0, "matmuls": forward.mixing, "layer": forward.weights + forward.mixing}[remat]
    return 3 * forward.total + again


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """The parameters of each part of a model, by its attribute, as "layers" or "shared"; shared blocks count once."""
    counts: dict[str, int] = {}
    for name, leaf in named_parameters(jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0)))).items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + leaf.size
    return counts


def match(
    config: Any,
    *,
    parameters: int | None = None,
    flops: int | None = None,
    length: int | None = None,
    vary: Sequence[str] = ("num_layers",),
) -> Any:
    """The architecture whose size is nearest to one that is wanted.

    Fields are varied one after the other, each to where the size is nearest with those before it as they have become;
    so name a coarse one first and a fine one after it, as ("num_layers", "ffn_size"). Values that the config refuses
    are passed over. With `num_layers`, what is said layer by layer goes on as `ModelConfig.with_num_layers` has it.

    Args:
        config: to begin with.
        parameters: wanted, shared ones counted once.
        flops: wanted of a forward pass, per token.
        length: tokens of a row, for flops; `config.max_position_embeddings` by default.
        vary: integer fields.

    Raises:
        ValueError: not exactly one of parameters and flops is given or it is below 1, or a field is no integer, has no
            valid value nearby, or does not change the size.
    """
    if (parameters is None) == (flops is None):
        raise ValueError(f"parameters={parameters} and flops={flops}: expected exactly one of them")
    target, length = (parameters or flops or 0), config.max_position_embeddings if length is None else length
    if target < 1:
        raise ValueError(f"parameters={parameters}, flops={flops}: expected at least 1")
    for field in vary:
        if not isinstance(getattr(config, field, None), int) or isinstance(getattr(config, field), bool):
            raise ValueError(f"vary names {field!r}, expected integer fields of {type(config).__name__}")

    def size(candidate: ModelConfig) -> int:
        if parameters is not None:
            return sum(count_parameters(candidate).values())
        return forward_flops(candidate, length).total

    for field in vary:
        config = _nearest(config, field, size, target)
    return config


TRIED = 512
"""Values that are looked through for one that a config accepts, at least."""


def _nearest(config: Any, field: str, size: Any, target: int) -> Any:
    """With the value of a field where the size, which grows with it, is nearest to the target."""
    found: dict[int, Any] = {}

    def at(value: int) -> Any:
        """With the nearest valid value that is at least this."""
        for tried in range(value, 2 * value + TRIED):
            if tried in found:
                return found[tried]
            try:
                changed = config.with_num_layers(tried) if field == "num_layers" else _replaced(config, field, tried)
            except ValueError:
                continue
            found[tried] = changed
            return changed
        raise ValueError(f"vary names {field!r}: no value from {value} to {2 * value + TRIED - 1} is valid")

    low, high = 1, max(2, getattr(config, field))
    if size(at(low)) == size(at(4 * high)):
        raise ValueError(f"vary names {field!r}, on which the size does not depend")
    while size(at(high)) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(at(middle)) < target else (low, middle)
    return min((at(low), at(high)), key=lambda candidate: abs(size(candidate) - target))


def _replaced(config: Any, field: str, value: int) -> Any:
    return dataclasses.replace(config, **{field: value})
