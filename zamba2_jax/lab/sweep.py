"""A sweep as data: the file of `zamba2 sweep`, which is that of a run with a table [sweep]."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zamba2_jax.lab.fitting import fit_variants
from zamba2_jax.lab.result import Result
from zamba2_jax.lab.together import Together
from zamba2_jax.lab.trials import add_variant, make_trials, named_configs
from zamba2_jax.train.config import RunConfig, from_table, read_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """A variant.

    Attributes:
        name: its own.
        set: values by keys of the run, as "model.num_layers".
    """

    name: str
    set: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What differs between the runs of a sweep.

    Attributes:
        seeds: of every variant.
        grid: lists of values by keys of the run; every combination is a variant, or with `variants` several of each.
        variants: by name.
        baseline: the variant to compare others with.
        necessity: patterns of parts whose necessity is measured; see `evaluate.necessity`.
        together: how runs are trained together; see `lab.together`.
    """

    seeds: tuple[int, ...] = (0,)
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    variants: tuple[VariantConfig, ...] = ()
    baseline: str | None = None
    necessity: tuple[str, ...] = ()
    together: Together | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that has been read.

    Attributes:
        directory: where its runs are written.
        variants: runs by name.
        config: the table [sweep].
    """

    directory: Path
    variants: Mapping[str, RunConfig]
    config: SweepConfig

    def run(self, console: Console) -> Result:
        """Trains what is not done; see `fit`, also for what it raises."""
        config = self.config
        return fit_variants(
            self.variants,
            seeds=config.seeds,
            necessity=config.necessity,
            baseline=config.baseline,
            directory=self.directory,
            together=config.together,
            report=None,
            console=console,
        )


def load_sweep(path: Path, overrides: Sequence[str] = (), *, output: Path | None = None) -> Sweep:
    """Reads a sweep from a TOML file.

    Args:
        path: the file.
        overrides: "key=value" each, as of `load_config`; keys of the table begin with "sweep.".
        output: directory of the sweep, in place of the file's.

    Raises:
        ValueError: the file, an override or a variant is not valid, or two variants have one name.
        OSError: the file cannot be read.
    """
    table = read_table(path, overrides)
    if "sweep" not in table:
        raise ValueError(f"{path} has no table [sweep]: expected one with seeds, grid or variants")
    config = from_table(SweepConfig, table.pop("sweep"), "sweep")
    if output is not None:
        table["directory"] = str(output)
    run = from_table(RunConfig, table)
    named: dict[str, RunConfig] = {}
    for variant in config.variants:
        add_variant(named, variant.name, run, variant.set)
    variants = named_configs(named or run, config.grid)
    make_trials(variants, config.seeds)
    if config.baseline is not None and config.baseline not in variants:
        raise ValueError(f"sweep.baseline={config.baseline!r}: expected one of {', '.join(variants)}")
    return Sweep(directory=Path(run.directory), variants=variants, config=config)
