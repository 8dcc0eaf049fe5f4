"""Runs of one shape by one compiled program: in threads of a CPU, or as rows of one stacked state.

What differs between them is data to the program: the weights, the batches, and the learning rates of all steps. Each
run keeps its own loop, `train.loop.train`, in a thread of its own; here is the step that it takes.
"""

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zamba2_jax.data.batches import Batch
from zamba2_jax.lab.trials import Trial
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.ops.placement import platform
from zamba2_jax.parallel.hosts import place, run_mesh
from zamba2_jax.parallel.mesh import MeshSizes, bytes_per_device, make_mesh
from zamba2_jax.train.run import fresh_state
from zamba2_jax.train.schedule import boundaries, learning_rate
from zamba2_jax.train.step import StepMetrics, TrainState, TrainStep, abstract_batch, abstract_state, train_step
from zamba2_jax.typing import Tree

Together = Literal["threads", "vmap", "turn"]
"""How runs of one shape are trained together: each by a thread of its own, as many at a time as the process has CPU
cores; all at once by `jax.vmap`; or not, but one after the other."""


def default_together() -> Together:
    """The fastest way on the platform: small matrices keep one core busy, and a GPU or TPU only many at once.

    `benchmarks/together.py` has the numbers.
    """
    return "threads" if platform() == "cpu" else "vmap"


class Group(NamedTuple):
    """Trials that one program trains.

    Attributes:
        architecture: of their models.
        trials: that differ in nothing that the program depends on.
    """

    architecture: ModelConfig
    trials: list[Trial]

    @property
    def steps(self) -> int:
        """Of the longest of them."""
        return max(boundaries(trial.config.phases)[-1] for trial in self.trials)

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(repr(trial.variant) for trial in self.trials))


def make_groups(trials: Iterable[Trial], architectures: Sequence[ModelConfig]) -> list[Group]:
    """The trials, each with its architecture, in groups, in the order of their first trials."""
    found: dict[str, Group] = {}
    for trial, architecture in zip(trials, architectures, strict=True):
        config = trial.config
        table = config.as_dict()
        fixed = {key: table[key] for key in ("optimizer", "dtype", "step", "batch_size", "length", "mesh")}
        shape = [architecture.model_type, dataclasses.asdict(architecture), fixed, config.logging.health_every]
        found.setdefault(json.dumps(shape), Group(architecture, [])).trials.append(trial)
    return list(found.values())


class Program(Protocol):
    """The compiled step of a group.

    Attributes:
        mesh: to set around what its runs compute.
        workers: of its runs that go on at a time.
        memory: bytes that they need then, on each device.
    """

    mesh: Mesh
    workers: int
    memory: int

    def begin(self, trial: Trial) -> tuple[TrainState, TrainStep]:
        """The state of a trial before its first step, and its step."""
        ...

    def leave(self, trial: Trial) -> None:
        """Says that a trial takes no more steps."""
        ...


def compile_group(group: Group, together: Together) -> Program:
    """Compiles the step of a group. A mesh of several devices takes its runs one after the other.

    Raises:
        ValueError: a step does not fit into the memory of the devices; or as `train_step`.
    """
    one = math.prod(dataclasses.astuple(group.trials[0].config.mesh)) == 1
    try:
        if together == "vmap" and one:
            return Stacked(group)
        return Apart(group, threads=together == "threads" and one)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise ValueError(f"{group}: does not fit in the memory of the devices: {str(error).splitlines()[0]}") from error


def state_bytes(group: Group) -> int:
    """Bytes of parameters and optimizer of one run, on the device that holds most of them; nothing is compiled."""
    config = group.trials[0].config
    mesh = run_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return bytes_per_device(
            abstract_state(group.architecture, config.optimizer.transformation(), mesh, config.dtype)
        )


def available_memory() -> int | None:
    """Bytes that a device has free, the least of all; of a CPU what the machine has. None where nobody says."""
    if platform() == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return None
    return min(stat["bytes_limit"] - stat["bytes_in_use"] for stat in stats)


class Apart:
    """Every run has a state of its own; one program for a run's step, which threads may run at the same time.

    With threads the program keeps to one core, so that they do not wait for each other.
    """

    def __init__(self, group: Group, *, threads: bool):
        config = group.trials[0].config
        self._group = group
        self.mesh = run_mesh(config.mesh)
        self.workers = min(_cores(), len(group.trials)) if threads else 1
        with jax.set_mesh(self.mesh):
            optimizer = config.optimizer.transformation()
            state = abstract_state(group.architecture, optimizer, self.mesh, config.dtype)
            batch = abstract_batch(config.batch_size, config.length, self.mesh)
            rates = jax.ShapeDtypeStruct((group.steps,), jnp.float32)
            lowered = jax.jit(partial(_step, group), donate_argnums=0).lower(state, batch, rates)
            alone = platform() == "cpu" and self.workers > 1
            self._compiled = lowered.compile({"xla_cpu_multi_thread_eigen": False} if alone else None)
        self.memory = self.workers * _program_bytes(self._compiled)

    def begin(self, trial: Trial) -> tuple[TrainState, TrainStep]:
        """As `Program`."""
        config, rates = trial.config, jnp.asarray(_rates(trial, self._group.steps))

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            return self._compiled(state, place(batch, self.mesh, config.batch_size), rates)

        return _fresh(trial, self._group, self.mesh), step

    def leave(self, trial: Trial) -> None:
        """As `Program`."""


class Row:
    """Stands for the state of a run whose arrays are a row of a stack."""

    def __init__(self, read: Callable[[], LanguageModel]):
        self._read = read

    @property
    def model(self) -> LanguageModel:
        """The parameters now, copied out of the stack."""
        return self._read()


class Stacked:
    """All runs of a group in one state, a row each, over as many devices as divide their number.

    A step is taken when every run that has not left has brought its batch. The row of one that has left goes on with
    its last batch, and nobody looks at it.
    """

    def __init__(self, group: Group):
        count = len(group.trials)
        devices = max(size for size in range(1, jax.device_count() + 1) if count % size == 0)
        self._group, self.workers = group, count
        self._over, self.mesh = make_mesh(data=devices), run_mesh(MeshSizes())
        self._rows = {trial.name: row for row, trial in enumerate(group.trials)}
        self._active, self._waiting = set(range(count)), dict[int, Batch]()
        self._last: dict[int, Batch] = {}
        self._results: dict[int, StepMetrics] = {}
        self._error: BaseException | None = None
        self._state: TrainState | None = None
        self._turn = threading.Condition()
        self._rates = np.stack([_rates(trial, group.steps) for trial in group.trials])
        with jax.set_mesh(self._over):
            self._like, self._compiled = self._compile()
        self.memory = _program_bytes(self._compiled)

    def begin(self, trial: Trial) -> tuple[TrainState, TrainStep]:
        """As `Program`. What stands for the state has `model` alone."""
        row = self._rows[trial.name]
        with self._turn:
            fresh = _fresh(trial, self._group, self.mesh)
            with jax.set_mesh(self._over):
                if self._state is None:
                    self._state = jax.jit(partial(_zeros, self._like), out_shardings=self._shardings())()
                put = jax.jit(_put, donate_argnums=0, out_shardings=self._shardings())
                self._state = put(self._state, jax.device_get(fresh), row)

        def read() -> LanguageModel:
            with self._turn:
                with jax.set_mesh(self._over):
                    model = _take(cast(TrainState, self._state).model, row)
                return jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))

        handle = cast(TrainState, Row(read))
        return handle, lambda state, batch: (handle, self._take_step(row, batch))

    def leave(self, trial: Trial) -> None:
        """As `Program`."""
        with self._turn:
            self._active.discard(self._rows[trial.name])
            self._run_if_complete()

    def _take_step(self, row: int, batch: Batch) -> StepMetrics:
        """What a row saw in the next step, when it has been taken."""
        with self._turn:
            self._waiting[row] = batch
            self._run_if_complete()
            self._turn.wait_for(lambda: row in self._results or self._error is not None)
            if self._error is not None:
                raise RuntimeError("the step of all runs failed") from self._error
            return self._results.pop(row)

    def _run_if_complete(self) -> None:
        """Takes a step of all rows if all batches are there."""
        if not self._active or set(self._waiting) != self._active:
            return
        try:
            self._last |= self._waiting
            some = next(iter(self._waiting.values()))
            batches = [self._last.get(row, some) for row in range(self.workers)]
            stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
            self._state, metrics = self._compiled(self._state, stacked, self._rates)
            self._results = {row: metrics[row] for row in self._waiting}
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._waiting = {}
            self._turn.notify_all()

    def _compile(self) -> tuple[TrainState, Any]:
        """Shapes of the stacked state, and the step of all rows."""
        group, count = self._group, self.workers
        config = group.trials[0].config
        one = run_mesh(MeshSizes())
        state = abstract_state(group.architecture, config.optimizer.transformation(), one, config.dtype)
        batch = abstract_batch(config.batch_size, config.length, one)
        rows = NamedSharding(self._over, PartitionSpec("data"))

        def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=rows)

        whole = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self._over, PartitionSpec()))
        like = dataclasses.replace(jax.tree.map(stack, state), step=whole)
        rates = jax.ShapeDtypeStruct((count, group.steps), jnp.float32, sharding=rows)
        step = jax.vmap(partial(_step, group), in_axes=(_on_rows(0, None), 0, 0), out_axes=(_on_rows(0, None), 0))
        if self._over.size > 1:
            data = PartitionSpec("data")
            specs = _on_rows(data, PartitionSpec())
            step = jax.shard_map(step, in_specs=(specs, data, data), out_specs=(specs, data), check_vma=False)

        def all_rows(state: TrainState, batch: Batch, rates: jax.Array) -> tuple[TrainState, list[StepMetrics]]:
            state, metrics = step(state, batch, rates)
            return state, [_row(metrics, row) for row in range(count)]

        return like, jax.jit(all_rows, donate_argnums=0).lower(like, jax.tree.map(stack, batch), rates).compile()

    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self._like)


def _on_rows(rows: Any, whole: Any) -> TrainState:
    """One thing for what a stacked state has by rows, another for what all rows share.

    That is the step: what depends on it alone is a branch, not a choice of both.
    """
    return TrainState(step=whole, skipped=rows, model=rows, opt_state=rows)


def _step(group: Group, state: TrainState, batch: Batch, rates: jax.Array) -> tuple[TrainState, StepMetrics]:
    """The step of one run, `rates` being its learning rates, [steps]."""
    config = group.trials[0].config
    return train_step(
        state,
        batch,
        optimizer=config.optimizer.transformation(),
        schedule=lambda step: rates[step],
        config=config.step,
        health_every=config.logging.health_every or None,
    )


def _row(stack: Tree, row: int | jax.Array) -> Tree:
    return jax.tree.map(lambda rows: rows[row], stack)


def _rates(trial: Trial, steps: int) -> np.ndarray:
    """The learning rates of a trial, and as many more as fill [steps]."""
    schedule = learning_rate(trial.config.phases, trial.config.learning_rate)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)


def _fresh(trial: Trial, group: Group, mesh: Mesh) -> TrainState:
    return fresh_state(trial.config, group.architecture, trial.config.optimizer.transformation(), mesh)


def _put(stack: TrainState, state: TrainState, row: int) -> TrainState:
    """The stack with a state for one of its rows."""
    return jax.tree.map(lambda rows, value: rows if rows.ndim == value.ndim else rows.at[row].set(value), stack, state)


def _zeros(like: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


_take = jax.jit(_row)


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _program_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds while it runs, arguments and results included."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )
