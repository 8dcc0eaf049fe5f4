"""Named taps: seeing, and changing, what flows inside a model.

Blocks show every named value to a tap and go on with what it returns. Names are paths: `embed`, `layers.3.input`,
`layers.3.shared.attention.q`, `layers.3.mamba.ssm_state`, `layers.3.mlp.inner`, `layers.3.output`, `final_norm`,
`logits`; `interpret.taps.tap_names` lists them.
"""

import dataclasses
from collections.abc import Callable

from zamba2_jax.typing import Array

Edit = Callable[[str, Array], Array]
"""(name, value) -> what takes the value's place, of the same shape and dtype; a pure function."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """What of a pass is changed, and what is given back beside its result.

    It is told names, not layers, so that the same tap works wherever the layers run: in a full pass, with a cache, in a
    step, under `jax.checkpoint`. As an argument of a compiled function it is static, and compiled anew when `edit` is
    another function.

    Attributes:
        edit: changes values; none by default.
        select: whether the value of a name is given back, as it is after `edit`; none by default.
        scope: what stands before every name here, "layers.3." say.
        values: what was selected, by its whole name. A traced function has its own, and has to return it.
    """

    edit: Edit | None = None
    select: Callable[[str], bool] | None = None
    scope: str = ""
    values: dict[str, Array] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __call__(self, name: str, value: Array) -> Array:
        """What a block goes on with in place of a value."""
        name = self.scope + name
        if self.edit is not None:
            value = self.edit(name, value)
        if self.select is not None and self.select(name):
            self.values[name] = value
        return value

    @property
    def is_active(self) -> bool:
        """Whether it does anything."""
        return self.edit is not None or self.select is not None

    def scoped(self, name: str) -> "Tap":
        """The tap for what is inside of `name`, with the same values. One that does nothing stays the same."""
        return dataclasses.replace(self, scope=f"{self.scope}{name}.") if self.is_active else self

    def edits(self) -> "Tap":
        """The tap, for what gives no values back.

        Raises:
            ValueError: it selects values.
        """
        if self.select is not None:
            raise ValueError("tap.select is given: expected edits alone, values come from interpret.taps.capture")
        return self

    def fresh(self) -> "Tap":
        """The tap for the inside of a traced function, nothing selected yet."""
        return dataclasses.replace(self, values={})


NO_TAP = Tap()
