"""Choices by name of the floors above that the command line offers, too; here, so that `--help` loads no JAX."""

from typing import Literal

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "associative", "sequential"]
"""How `ops.ssd` is computed: by kernels for one kind of device, or by one of two oracles."""

Remat = Literal["none", "layer", "matmuls"]
"""What the forward pass keeps for the backward one: all; the input of each layer; the results of its matrix products,
or sums of these, too, all else being recomputed."""

Decay = Literal["constant", "linear", "cosine", "exponential", "1-sqrt"]
"""How the learning rate falls in a phase of training."""
