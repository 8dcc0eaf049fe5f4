"""What parity has to know of each family in transformers: a module for each, found by `model_type`."""

import importlib

from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parity.families.base import ReferenceFamily

_MODULES = {
    "zamba2": "zamba2_jax.parity.families.zamba2",
    "zamba": "zamba2_jax.parity.families.zamba1",
    "mamba2": "zamba2_jax.parity.families.mamba2",
    "llama": "zamba2_jax.parity.families.llama",
    "mistral": "zamba2_jax.parity.families.mistral",
}


def reference_family(config: ModelConfig) -> ReferenceFamily:
    """The counterpart of an architecture's family.

    Raises:
        ValueError: transformers has none that this comparison knows.
    """
    name = config.model_type
    if name not in _MODULES:
        raise ValueError(f"parity of model_type {name!r}: expected one of {', '.join(_MODULES)}")
    return importlib.import_module(_MODULES[name]).FAMILY
