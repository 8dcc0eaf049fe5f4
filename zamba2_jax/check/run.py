"""What is checked where, in order; and what to set where something is wrong or slow."""

from collections.abc import Callable
from functools import partial

import jax

from zamba2_jax.check.compare import Case, Finding, check_case
from zamba2_jax.check.models import Dtype, check_generation, check_training_step, shallow
from zamba2_jax.check.ops import Platform, model_cases, small_cases
from zamba2_jax.models.registry import preset
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.ops.backend import XLA, default_backend
from zamba2_jax.parallel.mesh import local_mesh

Check = Callable[[], list[Finding]]

RUN_SETTINGS = ("scan", "attention")
"""Fields of `Backend` that a run's config has, as `step.scan`."""
FIELDS = (*RUN_SETTINGS, "cached_attention", "step")


def checks(model: str | None) -> dict[str, Check]:
    """All checks of the devices of this process, by name: small ones; then at the sizes of a preset, if one is given.

    Raises:
        ValueError: there is no such preset; or JAX sees no CPU, for the oracles, or devices of an unknown kind.
    """
    platform = this_platform()
    dtype: Dtype = "float32" if platform == "cpu" else "bfloat16"
    small = "zamba2-tiny" if platform == "cpu" else "zamba2-nano"  # docs/xla-notes.md: narrow-heads-on-tpu
    found: dict[str, Check] = {name: partial(_check_op, make) for name, make in small_cases(platform).items()}
    found |= _of_model(small, shallow(preset(small)), dtype, real=False)
    if model is not None:
        config = preset(model)
        cases = model_cases(config, platform).items()
        found |= {f"{name} of {model}": partial(_check_op, make) for name, make in cases}
        found |= _of_model(model, shallow(config), dtype, real=True)
    return found


def _of_model(name: str, config: ModelConfig, dtype: Dtype, *, real: bool) -> dict[str, Check]:
    """Of a whole model."""
    return {
        f"training step of {name}": partial(check_training_step, name, config, dtype, real=real),
        f"generation of {name}": partial(check_generation, name, config, dtype, real=real),
    }


def _check_op(make: Callable[[], Case]) -> list[Finding]:
    """On the first device."""
    with jax.set_mesh(local_mesh()):
        return check_case(make())


def this_platform() -> Platform:
    """Of JAX's default devices.

    Raises:
        ValueError: as of `checks`.
    """
    found = jax.default_backend()
    if found not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"JAX's devices are of the platform {found}: expected cpu, gpu or tpu")
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise ValueError(f"the oracles run on the CPU, and JAX sees none ({error}): unset JAX_PLATFORMS") from error
    return found  # type: ignore[return-value]


def is_wrong(finding: Finding) -> bool:
    """Whether its numbers are wrong, or there are none."""
    return finding.verdict in ("wrong", "failed")


def advice(found: list[Finding]) -> str:
    """What to set, in a run's config and in Python, in place of what is wrong or slow; that nothing is, if so."""
    wrong = [finding for finding in found if is_wrong(finding)]
    plain = sorted({finding.subject.name for finding in wrong if finding.implementation == "xla"})
    if plain:
        return (
            f"Plain XLA itself is wrong here ({', '.join(plain)}), and no setting helps: "
            "look at JAX's version, drivers and XLA_FLAGS."
        )
    changed = {field for finding in found for field in _fields_to_change(finding)}
    fields = [field for field in FIELDS if field in changed]
    if not fields:
        return "All right: the defaults are what to use."
    settings = " ".join(f"step.{field}=xla" for field in fields if field in RUN_SETTINGS)
    training = f"zamba2 train --set {settings}; " if settings else ""
    arguments = ", ".join(f'{field}="xla"' for field in fields)
    return f"Use instead: {training}in Python backend=dataclasses.replace(default_backend(dtype), {arguments})"


def _fields_to_change(finding: Finding) -> list[str]:
    """Of the backend: of what is wrong; of what is slow and the default; of a model that is wrong all kernels."""
    if finding.verdict == "right":
        return []
    with jax.set_mesh(local_mesh()):
        default = default_backend(finding.subject.dtype)
    if field := finding.subject.setting:
        return [field] if is_wrong(finding) or getattr(default, field) == finding.implementation else []
    return [field for field in FIELDS if is_wrong(finding) and getattr(default, field) != getattr(XLA, field)]
