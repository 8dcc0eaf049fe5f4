"""Small cases of every family that between them cover every branch of its architecture."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from zamba2_jax.models.registry import preset
from zamba2_jax.models.transformer.config import MistralConfig
from zamba2_jax.nn.config import RopeScaling
from zamba2_jax.parity.case import Case

LEFT_PADDING = (0, 5, 21, 1, 0, 36, 3, 11)
"""Of eight rows of 37 tokens."""


def _zamba2() -> Iterator[Case]:
    base = dataclasses.replace(preset("zamba2-tiny"), num_layers=5, hybrid_layer_ids=(1, 2, 4))
    changes: dict[str, dict[str, Any]] = {
        "1.2b-miniature": {"num_shared_blocks": 1, "ngroups": 1, "d_state": 20, "hybrid_layer_ids": (1, 3)},
        "2.7b-miniature": {"ngroups": 1, "hybrid_layer_ids": (0, 1, 3), "attention_adapters": False, "use_rope": False},
        "7b-miniature": {"hybrid_layer_ids": (0, 1, 3), "attention_adapters": False},
        "four-groups": {"hidden_size": 32, "mamba_heads": 8, "ngroups": 4},
        "small-heads-large-state": {"mamba_heads": 12, "d_state": 28},
        "grouped-kv-heads": {"kv_heads": 2, "attention_adapters": False},
        "no-rope": {"use_rope": False},
        "three-blocks": {"num_shared_blocks": 3, "hybrid_layer_ids": (0, 1, 3, 4)},
        "hybrid-first": {"hybrid_layer_ids": (0, 2)},
        "consecutive-hybrids": {"hybrid_layer_ids": (1, 2, 3)},
        "hybrid-last": {"hybrid_layer_ids": (2, 4)},
        "linear-biases": {"add_bias_linear": True},
        "untied-head": {"tie_embeddings": False},
    }
    for name, change in changes.items():
        yield Case(name, dataclasses.replace(base, **change))
    yield Case("long-context-rope", base.with_long_context())
    yield Case("many-chunks", base, batch=4, seq=201)
    yield Case("left-padding", base, seq=37, left_padding=LEFT_PADDING)


def _zamba1() -> Iterator[Case]:
    base = preset("zamba1-tiny")
    yield Case("zamba1-miniature", dataclasses.replace(base, mamba_heads=2, kv_heads=2, tie_embeddings=False))
    yield Case("zamba1-hybrid-first", dataclasses.replace(base, hybrid_layer_ids=(0, 2)))
    yield Case("zamba1-linear-biases", dataclasses.replace(base, use_proj_bias=True, use_conv_bias=False))
    # Without biases, as for Mamba2.
    yield Case("zamba1-left-padding", base, seq=37, left_padding=LEFT_PADDING)


def _mamba2() -> Iterator[Case]:
    base = preset("mamba2-tiny")
    plain = {"ngroups": 1, "expand": 3, "d_conv": 3, "use_conv_bias": False, "residual_in_fp32": False}
    yield Case("mamba2-miniature", dataclasses.replace(base, ngroups=1, d_state=20))
    yield Case("mamba2-linear-biases", dataclasses.replace(base, add_bias_linear=True, tie_embeddings=False))
    yield Case("mamba2-other-sizes", dataclasses.replace(base, rms_norm_eps=0.1, **plain))
    yield Case("mamba2-many-chunks", base, batch=4, seq=201)
    # Without biases: transformers has those of the in projections leak out of the padding.
    yield Case("mamba2-left-padding", base, seq=37, left_padding=LEFT_PADDING)


def _llama() -> Iterator[Case]:
    base = preset("transformer-tiny")
    # Of the frequencies of five pairs, 1 to 0.0016, one is kept, one is mixed and three are divided.
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)
    scaled = dataclasses.replace(base, rope_scaling=scaling, rope_theta=5e3, tie_embeddings=True)
    biases = dataclasses.replace(scaled, attention_bias=True, mlp_bias=True, rms_norm_eps=0.1)
    yield Case("llama-grouped-kv-heads", base)
    yield Case("llama-multi-head", dataclasses.replace(base, head_dim=None, kv_heads=6))
    yield Case("llama-scaled-rope", scaled)
    yield Case("llama-linear-biases", biases)
    yield Case("llama-left-padding", biases, seq=37, left_padding=LEFT_PADDING)


def _mistral() -> Iterator[Case]:
    base = MistralConfig(**dataclasses.asdict(preset("transformer-tiny")))
    window = dataclasses.replace(base, sliding_window=7)
    yield Case("mistral", base)
    yield Case("mistral-window", window)
    yield Case("mistral-window-left-padding", window, seq=37, left_padding=LEFT_PADDING)


VARIANTS = {case.name: case for cases in (_zamba2, _zamba1, _mamba2, _llama, _mistral) for case in cases()}
"""By name; those of Zamba2 have no prefix."""
