"""A training run as data: typed values, read from TOML or JSON, with every mistake named."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zamba2_jax.checkpoint.hub import local_directory
from zamba2_jax.data.synthetic import AnySource
from zamba2_jax.models.registry import DEFAULT, family, preset, read_config
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.mesh import MeshSizes
from zamba2_jax.train.optimizer import AdamW, Muon
from zamba2_jax.train.schedule import Phase, learning_rate
from zamba2_jax.train.step import StepConfig

T = TypeVar("T")

EMBEDDED_TOKENIZER = "embedded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model to train; exactly one of preset, architecture and hf.

    Attributes:
        preset: an architecture by name, with random weights.
        overrides: fields of the preset's architecture that are to be others. Keys that are not named here are taken for
            such, so that `model.num_layers = 9` beside a preset is one.
        architecture: the fields of an architecture, with random weights; its family by "model_type"; see
            `models.registry.DEFAULT`.
        hf: a checkpoint to start from, weights included: a directory or the id of a repository on the Hugging Face hub.

    Raises:
        ValueError: none or several are given, or overrides without a preset.
    """

    preset: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    architecture: Mapping[str, Any] | None = None
    hf: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("preset", "architecture", "hf") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"model: {given or 'nothing'} is given: expected one of preset, architecture, hf")
        if self.overrides and self.preset is None:
            raise ValueError(f"model: {', '.join(self.overrides)} is given beside {given[0]}: expected a preset")

    @classmethod
    def complete_table(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table with its overrides in one place."""
        own = {field.name for field in dataclasses.fields(cls)}
        others = {key: value for key, value in table.items() if key not in own}
        rest = {key: value for key, value in table.items() if key in own}
        return rest | {"overrides": {**rest.get("overrides", {}), **others}} if others else rest

    def resolve(self) -> ModelConfig:
        """The architecture.

        Raises:
            ValueError: it is not valid.
            OSError: there is no such checkpoint.
        """
        if self.preset is not None:
            return preset(self.preset, **self.overrides)
        if self.architecture is not None:
            return architecture_from_table(self.architecture, "model.architecture")
        return read_config(local_directory(str(self.hf)))


def architecture_from_table(table: object, place: str) -> ModelConfig:
    """An architecture of any family from its fields; `model_type` says of which, see `models.registry.DEFAULT`.

    Raises:
        ValueError: there is no such family, or as `from_table`.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{place} is {table!r}: expected a table")
    fields = {key: value for key, value in table.items() if key != "model_type"}
    return from_table(family(table.get("model_type", DEFAULT)).config, fields, place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
        every: steps between checkpoints; one more is written at the end.
        keep_last: checkpoints to keep.
        keep_every: those whose step is a multiple of it are kept for good.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate on, before the first step, at intervals and at the end of each phase.

    Attributes:
        every: steps between evaluations, counted within a phase.
        sources: held-out documents or synthetic tasks by name; all of them are used every time.
    """

    every: int = 1000
    sources: Mapping[str, AnySource] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run of Weights & Biases.

    Attributes:
        project: of the run.
        name: of the run; that of the run's directory by default.
        tags: of the run.
        mode: "offline" writes files for `wandb sync`, without the network; by default what WANDB_MODE says, or
            "online".
    """

    project: str = "zamba2-jax"
    name: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackioConfig:
    """A run of trackio, on this machine or in a Space.

    Attributes:
        project: of the run.
        name: of the run; that of the run's directory by default.
        space_id: the Hugging Face Space to send it to, as "owner/name"; None keeps it on this machine.
    """

    project: str = "zamba2-jax"
    name: str | None = None
    space_id: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackersConfig:
    """Where else records go; None is nowhere.

    Attributes:
        wandb: Weights & Biases, of the extra of that name.
        trackio: trackio, of the extra of that name.
    """

    wandb: WandbConfig | None = None
    trackio: TrackioConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported.

    Attributes:
        every: steps to a record, counted within a phase.
        tensorboard: whether to write TensorBoard files beside metrics.jsonl.
        trackers: a table for each tracker that gets the records; or their names, as ["wandb"], with defaults.
        health_every: steps to a measurement of the run's health, counted from its start; 0 for never. See
            docs/health.md.
        profile_start: step after which `jax.profiler` starts to look, at least 1, None for never.
        profile_steps: how many steps it looks at.
    """

    every: int = 10
    health_every: int = 20
    tensorboard: bool = True
    trackers: TrackersConfig = TrackersConfig()
    profile_start: int | None = None
    profile_steps: int = 3

    @classmethod
    def complete_table(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table with names of trackers as tables of their defaults."""
        names = table.get("trackers")
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return {**table, "trackers": {name: {} for name in names}}
        return dict(table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
        directory: of the run.
        model: what to train.
        tokenizer: "embedded", one trained on the embedded corpus; or what `load_tokenizer` takes, a tokenizer.json, a
            sentencepiece model, a directory that holds one, or the id of a repository on the Hugging Face hub. By
            default that of the token files, if there are such sources, or else of `model.hf`.
        sources: documents and synthetic tasks to train on, by the names that the shares of phases use.
        phases: one after the other.
        learning_rate: the peak that fractions in the phases are of.
        batch_size: rows of a step, on all devices together.
        length: tokens of a row.
        optimizer: AdamW or Muon, by its `kind`, with its numbers and groups of parameters.
        seed: of the initial weights, and of the data where `data_seed` is None.
        data_seed: of the order of the data and of the examples of synthetic tasks.
        init_scale: factors of the initial matrices by pattern of their names, of which the last that fits counts; see
            `train.patterns`.
        dtype: of the weight matrices; vectors are float32.
        step: how a step is computed: its compute dtype, parts of a batch, what is kept for the backward pass.
        mesh: over which the run is divided.
        meshes: in place of `mesh`, those that it may be divided over. At each start that is taken which the devices
            that are there allow; see `parallel.hosts.choose_mesh`.
        checkpoints, evaluation, logging: what is written, and when.
        max_skipped: so many steps in a row whose loss or gradient is not finite stop the run.

    Raises:
        ValueError: a value breaks a rule; the message names field, value and rule.
    """

    directory: str
    model: ModelSource
    tokenizer: str | None = None
    sources: Mapping[str, AnySource]
    phases: tuple[Phase, ...]
    learning_rate: float
    batch_size: int
    length: int
    optimizer: AdamW | Muon = dataclasses.field(default_factory=AdamW)
    seed: int = 0
    data_seed: int | None = None
    init_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshSizes = dataclasses.field(default_factory=MeshSizes)
    meshes: tuple[MeshSizes, ...] = ()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    max_skipped: int = 20

    def __post_init__(self) -> None:
        at_least_one = {
            "batch_size": self.batch_size,
            "max_skipped": self.max_skipped,
            "checkpoints.every": self.checkpoints.every,
            "checkpoints.keep_last": self.checkpoints.keep_last,
            "checkpoints.keep_every": self.checkpoints.keep_every,
            "evaluation.every": self.evaluation.every,
            "logging.every": self.logging.every,
            "logging.profile_steps": self.logging.profile_steps,
        }
        for name, value in at_least_one.items():
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.logging.health_every >= 0, "logging.health_every", self.logging.health_every, "at least 0")
        _require(self.length >= 2, "length", self.length, "at least 2")
        parts = self.step.microbatches
        _require(
            self.batch_size % parts == 0, "batch_size", self.batch_size, f"a multiple of step.microbatches={parts}"
        )
        for name, seed in (("seed", self.seed), ("data_seed", self.data_seed)):
            _require(seed is None or 0 <= seed < 2**31, name, seed, "an integer in [0, 2^31)")
        for pattern, factor in self.init_scale.items():
            _require(0 < factor < math.inf, f"init_scale.{pattern}", factor, "a finite number > 0")
        for number, mesh in enumerate(self.meshes):
            sizes = dataclasses.asdict(mesh)
            _require(min(sizes.values()) >= 1, f"meshes.{number}", sizes, "all sizes at least 1")
        alone = not self.meshes or self.mesh == MeshSizes()
        _require(alone, "mesh", dataclasses.asdict(self.mesh), "none, since meshes is given")
        none = not self.init_scale or self.model.hf is None
        _require(none, "init_scale", self.init_scale, f"none, since model.hf={self.model.hf!r} gives the weights")
        start = self.logging.profile_start
        _require(start is None or start >= 1, "logging.profile_start", start, "at least 1")
        learning_rate(self.phases, self.learning_rate)
        for phase in self.phases:
            for name in phase.shares:
                if name not in self.sources:
                    raise ValueError(f"phase {phase.name!r}: shares name {name!r}{nearest(name, self.sources)}")

    def as_dict(self) -> dict[str, Any]:
        """Tables for JSON, from which `from_table` makes the same value."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run from a TOML file, or from JSON if the name ends so.

    Args:
        path: the file.
        overrides: "key=value" each, keys as "phases.0.steps", values as TOML writes them; what is not TOML is text.

    Raises:
        ValueError: the file or an override is not valid, a key is unknown or missing, or a value breaks a rule.
        OSError: the file cannot be read.
    """
    return from_table(RunConfig, read_table(path, overrides))


def read_table(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables that `load_config` makes a run of.

    Raises:
        ValueError: the file or an override is not valid.
        OSError: the file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid: {error}") from error
    for override in overrides:
        key, value = parse_setting(override, "--set")
        _set(table, key, value, f"--set {override}")
    return table


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The run with other values for some keys, as "phases.0.steps" or "model.num_layers".

    Raises:
        ValueError: a key is unknown, or a value breaks a rule.
    """
    table = config.as_dict()
    for key, value in overrides.items():
        _set(table, key, value, f"{key}={value!r}")
    return from_table(RunConfig, table)


def from_table(kind: type[T], table: Any, place: str = "") -> T:
    """A dataclass from nested dicts and lists.

    Args:
        kind: its fields may be dataclasses, numbers, texts, `Literal`, and mappings, tuples and unions of such. Of a
            union of dataclasses the one is taken whose `kind`, a `Literal`, the table gives; without, the first one
            if it has a default there.
        table: the values.
        place: where the table stands, for messages.

    A dataclass may have a class method `complete_table`, which the table goes through first.

    Raises:
        ValueError: a key is unknown or missing, a value has another type, or the dataclass refuses it.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(table, Mapping):
        raise ValueError(f"{place or 'the file'} is {table!r}: expected a table")
    if (complete := getattr(kind, "complete_table", None)) is not None:
        table = dict(complete(table))
    for key in table:
        if key not in fields:
            raise ValueError(f"{_join(place, key)} is unknown{nearest(key, fields)}")
    required = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    missing = [_join(place, name) for name in required if name not in table]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    types_ = get_type_hints(kind)
    return kind(**{key: _convert(types_[key], value, _join(place, key)) for key, value in table.items()})


# What may differ when a run goes on: it changes where, how fast and how often, but not the numbers, except by rounding.
_FREE = ("directory", "mesh", "meshes", "checkpoints", "evaluation", "logging", "max_skipped")


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """What forbids a run to go on with another config, a line each.

    Phases may be appended, and sources for them. What is in `_FREE`, and of the step all but the z-loss, may differ.
    """
    old, new = before.as_dict(), now.as_dict()
    for tree in (old, new):
        tree["step"] = {"z_loss": tree["step"]["z_loss"]}
    new["phases"] = new["phases"][: len(old["phases"])]
    new["sources"] = {name: source for name, source in new["sources"].items() if name in old["sources"]}
    return differing(old, new, free=_FREE)


def differing(before: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str] = ()) -> list[str]:
    """Where two trees of tables, as of `RunConfig.as_dict`, differ but for the keys `free`, a line each."""
    flat_old, flat_new = (flatten({k: v for k, v in tree.items() if k not in free}) for tree in (before, now))
    return [
        f"{key}: {flat_old.get(key)!r} before, {flat_new.get(key)!r} now"
        for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]
        if flat_old.get(key) != flat_new.get(key)
    ]


def _convert(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return from_table(kind, value, place)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        inner = [argument for argument in arguments if argument is not types.NoneType]
        if len(inner) > 1 and all(map(dataclasses.is_dataclass, inner)):
            return _convert(_variant(inner, value, place), value, place)
        listed = isinstance(value, list | tuple)
        return _convert(next((k for k in inner if (get_origin(k) is tuple) == listed), inner[0]), value, place)
    if origin is Literal:
        _require(value in arguments, place, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is Mapping:
        _require(isinstance(value, dict), place, value, "a table")
        return {key: _convert(arguments[1], item, _join(place, key)) for key, item in value.items()}
    if origin is tuple:
        _require(isinstance(value, list | tuple), place, value, "a list")
        repeated = arguments[-1] is Ellipsis
        _require(repeated or len(value) == len(arguments), place, value, f"{len(arguments)} values")
        kinds = [arguments[0]] * len(value) if repeated else arguments
        return tuple(
            _convert(kind, item, _join(place, str(i))) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    return _convert_scalar(kind, value, place)


def _variant(kinds: Sequence[type], table: Any, place: str) -> type:
    """The one of several dataclasses that a table is for."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{place} is {table!r}: expected a table")
    by_name = {name: kind for kind in kinds for name in get_args(get_type_hints(kind)["kind"])}
    default = next(field.default for field in dataclasses.fields(kinds[0]) if field.name == "kind")
    name = table.get("kind", default)
    if name is dataclasses.MISSING:
        raise ValueError(f"{_join(place, 'kind')} missing")
    _require(isinstance(name, str) and name in by_name, _join(place, "kind"), name, f"one of {', '.join(by_name)}")
    return by_name[name]


def _convert_scalar(kind: type, value: Any, place: str) -> Any:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(valid and not (kind is float and math.isnan(value)), place, value, names[kind])
    return value


def parse_setting(text: str, option: str) -> tuple[str, Any]:
    """The key, as "phases.0.steps", and the value of "key=value"; what is not TOML is text.

    Args:
        text: from the command line.
        option: that it was given to, for the message.

    Raises:
        ValueError: there is no "=", or a part of the key is empty.
    """
    path, equals, written = text.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ValueError(f"{option} {text}: expected key=value")
    try:
        return path, tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return path, written


def _set(table: dict[str, Any], path: str, value: Any, shown: str) -> None:
    """Sets one value in nested tables and lists; `shown` begins the messages."""
    keys = path.split(".")
    if not all(keys):
        raise ValueError(f"{shown}: expected key=value")
    at: Any = table
    for depth, key in enumerate(keys):
        place = ".".join(keys[:depth])
        index: Any = key
        if isinstance(at, list):
            if not key.isdecimal() or int(key) >= len(at):
                raise ValueError(f"{shown}: {place} has the entries 0 to {len(at) - 1}, not {key}")
            index = int(key)
        elif not isinstance(at, dict):
            raise ValueError(f"{shown}: {place} is {at!r}, expected a table")
        if depth == len(keys) - 1:
            at[index] = value
        else:
            at = at[index] if isinstance(at, list) else at.setdefault(key, {})


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """Nested tables and lists as one table, by keys as "phases.0.steps"; empty ones are values."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flatten(item, _join(place, str(key))).items()}
    return {place: value}


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the nearest that is, or else all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": expected one of {', '.join(known)}"


def _require(valid: bool, name: str, value: object, rule: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r}: expected {rule}")
