"""Which implementation of the ops a pass runs, as one value: chosen once, passed down, never asked for in a block."""

import dataclasses
import warnings
from functools import cache
from typing import Literal, get_args

from zamba2_jax.choices import Implementation
from zamba2_jax.ops.attention import CachedImplementation
from zamba2_jax.ops.attention import Implementation as AttentionImplementation
from zamba2_jax.ops.glu import geglu, swiglu
from zamba2_jax.ops.linear import linear
from zamba2_jax.ops.norm import gated_rms_norm, rms_norm
from zamba2_jax.ops.placement import kernels
from zamba2_jax.ops.rope import rotate
from zamba2_jax.ops.ssd import default_implementation
from zamba2_jax.typing import Array, DTypeLike, Float, Int

StepImplementation = Literal["xla", "pallas_gpu"]
_NAMES = {
    "scan": get_args(Implementation),
    "attention": get_args(AttentionImplementation),
    "cached_attention": get_args(CachedImplementation),
    "step": get_args(StepImplementation),
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """How the ops of a model are computed; apart from rounding, nothing of it changes what they compute.

    Attributes:
        scan: of `ops.ssd`; of `ops.selective_scan` the oracle where it is one of the oracles of `ops.ssd`, else "xla".
        attention: of `ops.causal_attention`; "xla" takes the place of "cudnn" for what cuDNN does not take, and with a
            window.
        cached_attention: of `ops.cached_attention`; likewise.
        step: of one token through a Mamba2 block: "pallas_gpu" is kernels for few rows of bfloat16 on one GPU, for
            other rows and dtypes "xla" takes their place.
        custom_gradients: whether ops have hand-written gradients, which are for reverse mode, once.

    Raises:
        ValueError: there is no such implementation; the message names the field.
    """

    scan: Implementation = "xla"
    attention: AttentionImplementation = "xla"
    cached_attention: CachedImplementation = "xla"
    step: StepImplementation = "xla"
    custom_gradients: bool = True

    def __post_init__(self) -> None:
        for field, names in _NAMES.items():
            if getattr(self, field) not in names:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected one of {', '.join(names)}")

    @classmethod
    def reference(cls) -> "Backend":
        """The definitions in plain jnp, for any dtype: differentiable as often as wanted, in any mode.

        So `jax.jvp`, Hessian-vector products by forward over reverse, and float64 work on a whole model. Memory grows
        with the square of the length, and the scan goes token by token.
        """
        return cls(scan="sequential", attention="plain", custom_gradients=False)

    def linear(
        self,
        x: Float[Array, "*batch i"],
        w: Float[Array, "o i"],
        bias: Float[Array, " o"] | None = None,
        *,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "*batch o"]:
        """`ops.linear`."""
        return linear(x, w, bias, dtype=dtype, custom_gradient=self.custom_gradients)

    def rms_norm(
        self, x: Float[Array, "*batch d"], scale: Float[Array, "*#batch d"], eps: float
    ) -> Float[Array, "*batch d"]:
        """`ops.rms_norm`."""
        return rms_norm(x, scale, eps, custom_gradient=self.custom_gradients)

    def gated_rms_norm(
        self,
        x: Float[Array, "*batch e"],
        z: Float[Array, "*batch e"],
        scale: Float[Array, " e"],
        ngroups: int,
        eps: float,
    ) -> Float[Array, "*batch e"]:
        """`ops.gated_rms_norm`."""
        return gated_rms_norm(x, z, scale, ngroups, eps, custom_gradient=self.custom_gradients)

    def geglu(self, gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"]) -> Float[Array, "*batch f"]:
        """`ops.geglu`."""
        return geglu(gate, up, custom_gradient=self.custom_gradients)

    def swiglu(self, gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"]) -> Float[Array, "*batch f"]:
        """`ops.swiglu`."""
        return swiglu(gate, up, custom_gradient=self.custom_gradients)

    def rotate(
        self, x: Float[Array, "b t h p"], positions: Int[Array, "b t"], base: float | tuple[float, ...]
    ) -> Float[Array, "b t h p"]:
        """`ops.rotate`."""
        return rotate(x, positions, base, custom_gradient=self.custom_gradients)


XLA = Backend()
"""All of it in XLA, on any device."""


def default_backend(dtype: DTypeLike) -> Backend:
    """What was measured to be fastest for a model of this dtype, where it is going to run.

    That is on the mesh that is set, each device on its part, or else on JAX's default backend. Kernels on TPUs and on
    Hopper GPUs, on these those of the scan for bfloat16 only: on other GPUs they were not measured to be faster. XLA
    everywhere else, and with several devices without a mesh, among which no kernel can be divided. Where JAX lacks what
    our kernels are written with, XLA takes their place, with a warning.
    """
    found, scan = kernels(on_mesh=True), default_implementation(dtype, on_mesh=True)
    if found == "tpu":
        return Backend(scan=scan, attention="splash")
    if found is None:
        return Backend()
    if scan == "pallas_gpu" and not has_triton():
        scan = "xla"
    step: StepImplementation = "pallas_gpu" if kernels() == "gpu" and has_triton() else "xla"
    return Backend(scan=scan, attention="cudnn", cached_attention="cudnn", step=step)


@cache
def has_triton() -> bool:
    """Whether JAX has Pallas through Triton; warns where not (docs/xla-notes.md: pallas-through-triton)."""
    try:
        from jax.experimental.pallas import triton as _  # noqa: F401
    except ImportError as error:
        warnings.warn(f"JAX has no Pallas through Triton ({error}): XLA computes the scans, slower", stacklevel=3)
        return False
    return True
