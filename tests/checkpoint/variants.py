"""Architectures that between them hold every kind of tensor a checkpoint can have."""

import dataclasses

from tests.helpers import TINY

_BASE = dataclasses.replace(TINY, num_layers=5, hybrid_layer_ids=(0, 2, 3), ffn_size=44)

VARIANTS = {
    "two-blocks": _BASE,
    "one-block": dataclasses.replace(_BASE, num_shared_blocks=1, attention_adapters=False, use_rope=False),
    "three-blocks": dataclasses.replace(_BASE, num_shared_blocks=3, ngroups=1),
    "untied": dataclasses.replace(
        _BASE, tie_embeddings=False, add_bias_linear=True, attention_adapters=False, kv_heads=2
    ),
}
