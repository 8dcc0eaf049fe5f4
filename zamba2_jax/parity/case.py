"""What parity is checked on: architectures, token batches and random weights."""

import dataclasses
import math
import zlib
from typing import NamedTuple

import numpy as np

from zamba2_jax.models.tensors import Tensor
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.typing import Float, Int

FIRST_TOKEN = 3
"""Random tokens start here: PyTorch gives the padding token's embedding no gradient, whatever it was used for."""
PER_CHANNEL = ("A_log", "D", "dt_proj_bias")
"""Tensors that are no matrices, whatever their shape: Mamba1 has an axis for the heads in front."""


class Batch(NamedTuple):
    """Tokens, and where they are padding.

    Attributes:
        tokens: ids.
        segment_ids: 1, and 0 at padding; None where there is none.
    """

    tokens: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"] | None

    @property
    def real(self) -> np.ndarray:
        """True but at padding, [b, t]."""
        return np.ones(self.tokens.shape, bool) if self.segment_ids is None else self.segment_ids != 0


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture and the shape of a batch to run it on.

    Attributes:
        name: of the case.
        config: the architecture.
        batch: rows. Rounding errors of a row go together: with few rows their ratio on two sides is a matter of luck.
        seq: tokens per row.
        left_padding: padding at the start of each row; none by default.
    """

    name: str
    config: ModelConfig
    batch: int = 8
    seq: int = 45
    left_padding: tuple[int, ...] = ()

    def tokens(self, seed: int) -> Batch:
        """A random batch."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(FIRST_TOKEN, self.config.vocab_size, (self.batch, self.seq), np.int32)
        tokens = np.where(tokens == self.config.pad_token_id, FIRST_TOKEN, tokens)
        if not self.left_padding:
            return Batch(tokens, None)
        real = np.arange(self.seq) >= np.array(self.left_padding)[:, None]
        return Batch(np.where(real, tokens, 0), real.astype(np.int32))


def random_tensor(tensor: Tensor, seed: int) -> Float[np.ndarray, "..."]:
    """Random values for one tensor of a checkpoint, float32, the same for the same name and seed.

    At no place is a value neutral, as fresh parameters often are: scales differ from 1 and biases from 0.
    """
    # 16 raw bits each: the 7B model is made twice over when it is streamed.
    size, source = math.prod(tensor.shape), np.random.SFC64([seed, zlib.crc32(tensor.name.encode())])
    bits = source.random_raw(-(-size // 4)).view(np.int16)[:size].reshape(tensor.shape)
    kind = tensor.name.rsplit(".", 1)[-1]
    # Deviation 1/2 / sqrt(fan-in): larger ones make a model so chaotic that its rounding errors are a lottery.
    is_matrix = len(tensor.shape) > 1 and kind not in PER_CHANNEL
    width = 0.5 * (12 / tensor.shape[-1]) ** 0.5 if is_matrix else 1.0
    values = bits * np.float32(width * 2**-16)
    if kind == "A_log":
        values += np.log(1 + np.arange(values.shape[-1], dtype=np.float32))
    elif kind in ("dt_bias", "dt_proj_bias"):
        values = values * 6 - 4  # softplus of it from 0.0009 to 0.3
    elif kind == "D" or "norm" in tensor.name:
        values += 1
    return values
