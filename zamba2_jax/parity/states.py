"""What a layer carries on to the next token, by the names and in the layouts under which both sides show it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from zamba2_jax.parity.evidence import Items
from zamba2_jax.typing import Bool


class States(NamedTuple):
    """The states of a kind of layer.

    Attributes:
        names: under which they are compared; each is a group of evidence.
        taps: values inside of our layer that they are made of; see `nn.tap`.
        from_taps: makes them: (architecture, values by tap, where tokens are real [b, t]) -> states by name.
    """

    names: tuple[str, ...]
    taps: tuple[str, ...]
    from_taps: Callable[[Any, Mapping[str, np.ndarray], Bool[np.ndarray, "b t"]], Items]


def _recurrent(config: Any, values: Mapping[str, np.ndarray], real: np.ndarray) -> Items:
    """As PyTorch keeps them: all channels of the convolutions, [b, e + 2gn, past] or [b, e, past], and [b, h, p, n]."""
    conv = [values[name] for name in ("mamba.conv_x_state", "mamba.conv_bc_state") if name in values]
    return {"conv_state": np.concatenate(conv, axis=-1).swapaxes(1, 2), "ssm_state": values["mamba.ssm_state"]}


def _attended(config: Any, values: Mapping[str, np.ndarray], real: np.ndarray) -> Items:
    """As a cache of PyTorch keeps them: those that the next token sees, [b, kv, t, p], 0 at padding."""
    window, t = config.sliding_window, real.shape[1]
    first = 0 if window is None else max(t - window + 1, 0)
    kept = {"keys": values["attention.k"], "values": values["attention.v"]}
    return {name: (array * real[..., None, None])[:, first:].swapaxes(1, 2) for name, array in kept.items()}


MAMBA2 = States(
    names=("conv_state", "ssm_state"),
    taps=("mamba.conv_x_state", "mamba.conv_bc_state", "mamba.ssm_state"),
    from_taps=_recurrent,
)
"""Of a Mamba2 layer: the last inputs of its convolutions, and its recurrence."""
MAMBA1 = States(names=("conv_state", "ssm_state"), taps=("mamba.conv_x_state", "mamba.ssm_state"), from_taps=_recurrent)
"""Of a Mamba1 layer: likewise."""
ATTENTION = States(names=("keys", "values"), taps=("attention.k", "attention.v"), from_taps=_attended)
"""Of an attention layer: keys, rotated, and values."""
