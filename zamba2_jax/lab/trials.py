"""What is to be trained: variants, each a run's config, times seeds."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.train import recipe
from zamba2_jax.train.config import RunConfig, with_overrides

ONLY = "run"
"""The name of a variant that is given none."""


class Trial(NamedTuple):
    """One run of a variant.

    Attributes:
        variant: its name.
        seed: of the initial weights, and of the data where the variant's `data_seed` is None.
        config: of the run.
    """

    variant: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """As "wide/seed-3"; its directory in that of the sweep."""
        return f"{self.variant}/seed-{self.seed}"


def named_configs(
    configs: RunConfig | ModelConfig | Mapping[str, RunConfig | ModelConfig],
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, RunConfig]:
    """Variants by name: each config with each combination of the overrides.

    Args:
        configs: one, or several by name. An architecture is trained by `recipe.run_config`.
        overrides: by key, as "learning_rate" or "model.num_layers", a value for all, or a list of values to combine
            with those of other keys. A value that is itself a list stands in a list. Variants are named by the keys
            that have lists, as "learning_rate=0.003".

    Raises:
        ValueError: there is no variant, a list is empty, a name can be no directory's or is another's, a key is
            unknown, or a value breaks a rule; the message begins with the variant.
    """
    given = dict(configs) if isinstance(configs, Mapping) else {"": configs}
    if not given:
        raise ValueError("configs is empty: expected at least one")
    settings = dict(overrides or {})
    fixed = {key: value for key, value in settings.items() if not isinstance(value, list | tuple)}
    lists = {key: list(value) for key, value in settings.items() if key not in fixed}
    for key, values in lists.items():
        if not values:
            raise ValueError(f"overrides: {key} is empty: expected at least one value")
    found: dict[str, RunConfig] = {}
    for name, config in given.items():
        for combination in itertools.product(*lists.values()):
            chosen = dict(zip(lists, combination, strict=True))
            words = [name] if name else []
            full = ",".join([*words, *(f"{key}={_shown(value)}" for key, value in chosen.items())]) or ONLY
            add_variant(found, full, config, fixed | chosen)
    return found


def add_variant(
    variants: dict[str, RunConfig], name: str, config: RunConfig | ModelConfig, overrides: Mapping[str, Any]
) -> None:
    """Adds a config with overrides under a name.

    Raises:
        ValueError: as `named_configs`.
    """
    if not name or name.startswith(".") or "/" in name or not name.isprintable() or len(name) > 200:
        raise ValueError(f"variant {name!r}: expected a name that a directory can have, not beginning with a dot")
    if name in variants:
        raise ValueError(f"two variants are named {name!r}: expected distinct names")
    try:
        run = recipe.run_config(config) if isinstance(config, ModelConfig) else config
        run = with_overrides(run, overrides) if overrides else run
        if run.meshes:
            raise ValueError("meshes is given: expected mesh, which is the same for all runs")
        variants[name] = run
    except ValueError as error:
        raise ValueError(f"variant {name!r}: {error}") from error


def make_trials(variants: Mapping[str, RunConfig], seeds: Sequence[int]) -> list[Trial]:
    """Every variant with every seed, seed by seed within a variant.

    Raises:
        ValueError: there is no seed, one is there twice or out of range.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: expected at least one, all distinct")
    return [
        Trial(name, seed, dataclasses.replace(config, seed=seed)) for name, config in variants.items() for seed in seeds
    ]


def _shown(value: Any) -> str:
    """A value in the name of a variant."""
    if isinstance(value, list | tuple):
        return "-".join(map(_shown, value))
    if isinstance(value, dict):
        return "-".join(_shown(inner) for inner in value.values())
    return str(value).replace("/", "_")
