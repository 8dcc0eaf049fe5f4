"""What all layers of a pass share."""

from typing import Self

from flax import struct

from zamba2_jax.nn.tap import NO_TAP, Tap
from zamba2_jax.ops.backend import XLA, Backend
from zamba2_jax.typing import Array, Int


class Context(struct.PyTreeNode):
    """What is the same at every layer of a pass and has no gradient; a pytree of its arrays.

    Attributes:
        positions: of the tokens in their documents; with a cache also the slots they take.
        segment_ids: documents packed in a row, 0 for padding; see `ops.segments`. With a cache it marks padding at the
            end of a row and nothing else.
        backend: how ops are computed.
        tap: shown every named value; see `nn.tap`.
        is_step: whether every row has one token, after those of a cache.
    """

    positions: Int[Array, "b t"]
    segment_ids: Int[Array, "b t"] | None = None
    backend: Backend = struct.field(pytree_node=False, default=XLA)
    tap: Tap = struct.field(pytree_node=False, default=NO_TAP)
    is_step: bool = struct.field(pytree_node=False, default=False)

    def scoped(self, name: str) -> Self:
        """For what is inside of `name`."""
        return self.replace(tap=self.tap.scoped(name)) if self.tap.is_active else self

    def fresh(self) -> Self:
        """The context with a tap that has recorded nothing yet; a traced function returns what its own has recorded."""
        return self.replace(tap=self.tap.fresh())
