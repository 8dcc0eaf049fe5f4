"""A training run from its config to its last checkpoint, over a mesh, to be stopped and started at will."""

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.data.batches import Batch, Source, held_out
from zamba2_jax.data.documents import Documents
from zamba2_jax.data.synthetic import AnySource, open_source
from zamba2_jax.models.flops import train_flops
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.hosts import choose_mesh, host_share, place, preemption, run_mesh
from zamba2_jax.parallel.mesh import check_mesh
from zamba2_jax.text.tokenizer import Tokenizer
from zamba2_jax.train import directory as layout
from zamba2_jax.train.config import LoggingConfig, RunConfig
from zamba2_jax.train.goodput import Clock, describe
from zamba2_jax.train.loop import AfterStep, DivergedError, Position, Stage, make_stages, train
from zamba2_jax.train.metrics import (
    EvalRecord,
    GoodputRecord,
    JsonLines,
    Record,
    Report,
    TensorBoard,
    TrainRecord,
    as_record,
    bits_per_byte,
    read_records,
    tee,
)
from zamba2_jax.train.patterns import check_patterns, scale_matrices
from zamba2_jax.train.peak import peak_flops
from zamba2_jax.train.progress import ProgressView
from zamba2_jax.train.schedule import boundaries, learning_rate
from zamba2_jax.train.stacks import parameter_names
from zamba2_jax.train.step import TrainState, abstract_batch, abstract_state, compile_train_step, init_state
from zamba2_jax.train.supervisor import Lifeline
from zamba2_jax.train.trackers import check_installed, open_trackers


def run(config: RunConfig, console: Console, lifeline: Lifeline | None = None) -> bool:
    """Trains from where the run in `config.directory` stands, or from the beginning, to the end.

    Everything that can be wrong with config, data, mesh and directory is found before the first step. With several
    processes each of them calls this, and the directory is one they share, or in an object store.

    Args:
        config: of the run.
        console: where to show it; one that is quiet in all processes but the first.
        lifeline: to what supervises this process.

    Returns:
        Whether the run is done; if not, it was told to stop by SIGTERM, and has left a checkpoint.

    Raises:
        ValueError: the config, the data or the mesh is not valid, the run in the directory is another one, or a step
            does not fit in the memory of the devices.
        OSError: a file or directory cannot be read or written; with a checkpoint the last good one is named.
        DivergedError: `config.max_skipped` steps in a row were not finite.
    """
    clock = Clock()
    with contextlib.ExitStack() as stack:
        preempted = stack.enter_context(preemption())
        place = stack.enter_context(layout.open_run(config.directory))
        plan = _prepare(config, place.directory, console)
        stack.enter_context(jax.set_mesh(plan.mesh))
        keep = config.checkpoints
        checkpoints = stack.enter_context(place.checkpoints(keep_last=keep.keep_last, keep_every=keep.keep_every))
        total = boundaries(config.phases)[-1]
        lifeline = lifeline or Lifeline()
        if lifeline.orders.before is not None:
            checkpoints.delete_from(lifeline.orders.before)
        if not checkpoints.steps or checkpoints.steps[-1] < total:
            try:
                _go_on(plan, checkpoints, preempted, console, stack, clock, lifeline)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("RESOURCE_EXHAUSTED"):
                    raise
                raise ValueError(
                    f"a step does not fit in the memory of the devices ({str(error).splitlines()[0]}): expected more "
                    f"step.microbatches than {config.step.microbatches}, step.remat, or a larger mesh"
                ) from error
        done = checkpoints.steps[-1]
        console.print(f"{done} of {total} steps are done; the last checkpoint is {checkpoints.latest}", soft_wrap=True)
        if jax.process_index() == 0:
            _show_goodput(plan.directory / layout.METRICS, console)
        return done == total


def _show_goodput(path: Path, console: Console) -> None:
    lines = read_records(path) if path.is_file() else []
    records = [record for record in map(as_record, lines) if isinstance(record, GoodputRecord)]
    if text := describe(records):
        console.print(text, soft_wrap=True)


class _Plan(NamedTuple):
    """A run that has been found to be good.

    Attributes:
        config: what was asked for.
        architecture: of the model.
        directory: of the run, on this machine.
        mesh: over which it runs.
        stages: the phases, with this process's part of their batches.
        data: that it reads.
    """

    config: RunConfig
    architecture: ModelConfig
    directory: Path
    mesh: Mesh
    stages: list[Stage]
    data: "Data"


def _prepare(config: RunConfig, directory: Path, console: Console) -> _Plan:
    """Finds what can be wrong, opens the data, and writes down what the run is."""
    mesh = run_mesh(choose_mesh(config.meshes) if config.meshes else config.mesh)
    if config.meshes:
        console.print(f"The mesh is {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}")
    if jax.process_index() == 0:
        check_installed(config.logging.trackers)
    architecture = layout.resolve_architecture(config, directory)
    check_mesh(architecture, mesh, batch=config.batch_size, length=config.length)
    console.print("Opening the data")
    tokenizer = layout.open_tokenizer(config, directory, architecture.vocab_size)
    check_names(config, architecture)
    data = open_data(config, tokenizer, architecture.vocab_size, mesh)
    stages = data.stages(config, mesh)
    if jax.process_index() == 0:
        layout.write_run(config, architecture, tokenizer, directory)
    return _Plan(config, architecture, directory, mesh, stages, data)


def check_names(config: RunConfig, architecture: ModelConfig) -> None:
    """Whether what the config says of parameters by their names is about some.

    Raises:
        ValueError: a pattern fits no parameter; the message names its place.
    """
    names = parameter_names(jax.eval_shape(lambda: init_model(architecture, rngs=nnx.Rngs(0))))
    config.optimizer.check(names)
    check_patterns(((f"init_scale.{pattern}", pattern) for pattern in config.init_scale), names)


class Data(NamedTuple):
    """What a run reads.

    Attributes:
        sources: to train on, by name.
        held_out: batches to evaluate on by name, on the mesh.
        texts: their tokens and the bytes of text these stand for, where that is known.
        vocab_size: that all ids are below.
    """

    sources: Mapping[str, Source]
    held_out: Mapping[str, list[Batch]]
    texts: Mapping[str, tuple[int, int]]
    vocab_size: int

    def stages(self, config: RunConfig, mesh: Mesh) -> list[Stage]:
        """The phases of a run, with this process's part of their batches."""
        return make_stages(
            config.phases,
            self.sources,
            batch_size=config.batch_size,
            length=config.length,
            seed=config.seed if config.data_seed is None else config.data_seed,
            share=host_share(mesh, config.batch_size, config.length),
            vocab_size=self.vocab_size,
        )

    def with_bits(self, record: EvalRecord) -> EvalRecord:
        """The record with its bits per byte, where they are known."""
        if record.held_out not in self.texts:
            return record
        return dataclasses.replace(record, bits_per_byte=bits_per_byte(record.loss, *self.texts[record.held_out]))


def open_data(config: RunConfig, tokenizer: Tokenizer | None, vocab_size: int, mesh: Mesh) -> Data:
    """Opens the sources of a run, and packs those it is evaluated on.

    Raises:
        ValueError, OSError: as `open_source`, `held_out`.
    """

    def open_all(sources: Mapping[str, AnySource]) -> dict[str, Source]:
        return {name: open_source(source, tokenizer, vocab_size=vocab_size) for name, source in sources.items()}

    sizes = {"batch_size": config.batch_size, "length": config.length, "vocab_size": vocab_size}
    unseen = open_all(config.evaluation.sources)
    return Data(
        sources=open_all(config.sources),
        held_out={
            name: [place(batch, mesh, config.batch_size) for batch in held_out(source, name=name, **sizes)]
            for name, source in unseen.items()
        },
        texts={
            name: (source.tokens, source.text_bytes)
            for name, source in unseen.items()
            if isinstance(source, Documents) and source.text_bytes
        },
        vocab_size=vocab_size,
    )


def _go_on(
    plan: _Plan,
    checkpoints: Checkpoints,
    preempted: Callable[[int], bool],
    console: Console,
    stack: contextlib.ExitStack,
    clock: Clock,
    lifeline: Lifeline,
) -> None:
    """Trains from the last checkpoint to the end, or until it is told to stop, and saves."""
    config, mesh, optimizer = plan.config, plan.mesh, plan.config.optimizer.transformation()
    orders = lifeline.orders
    taken = checkpoints.steps[-1] if checkpoints.steps else 0
    console.print(f"Compiling; {taken} of {boundaries(config.phases)[-1]} steps are done")
    report = _open_reports(plan, taken, console, stack) if jax.process_index() == 0 else _ignore
    state, start = _start(plan, optimizer, checkpoints)
    schedule = learning_rate(config.phases, config.learning_rate)
    with clock.during("compile"):
        step = compile_train_step(
            state,
            abstract_batch(config.batch_size, config.length, mesh),
            optimizer=optimizer,
            schedule=schedule,
            config=config.step,
            health_every=config.logging.health_every or None,
        )
    report(clock.record(step=taken, first=taken, cause=orders.cause))
    profiler = stack.enter_context(_Profiler(config.logging, plan.directory / layout.PROFILE))

    def saved(step: int) -> None:
        report(clock.record(step=step, first=taken, cause=orders.cause))

    try:
        with clock.during("steps"):
            train(
                state,
                lambda state, batch: step(state, place(batch, mesh, config.batch_size)),
                plan.stages,
                held_out=plan.data.held_out,
                log_every=config.logging.every,
                eval_every=config.evaluation.every,
                report=report,
                health_every=config.logging.health_every or None,
                start=start,
                after_step=_after_step(config, checkpoints, preempted, profiler, clock, saved, lifeline),
                skip_to=orders.skip_to,
                max_skipped=config.max_skipped,
                step_config=config.step,
                clock=clock,
            )
        with clock.during("checkpoint"):
            checkpoints.wait()
        saved(checkpoints.steps[-1])
    except (DivergedError, OSError) as error:
        kept = f"the last checkpoint is {checkpoints.latest}" if checkpoints.steps else "there is no checkpoint yet"
        message = f"{error}; {kept}"
        if not isinstance(error, DivergedError):
            raise OSError(message) from error
        lifeline.diverged(error.step, error.phase, error.batch)
        if jax.process_index() == 0:
            (plan.directory / layout.DIVERGED).write_text(f"{error}\n", encoding="utf-8")
        raise DivergedError(message, step=error.step, phase=error.phase, batch=error.batch) from error


def _start(
    plan: _Plan, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, Position | None]:
    """The state to go on from, and where it stands: the last checkpoint, or else the beginning."""
    config = plan.config
    if checkpoints.steps:
        like = abstract_state(plan.architecture, optimizer, plan.mesh, config.dtype)
        state, note = checkpoints.restore(checkpoints.steps[-1], like)
        return state, Position(**note)
    return fresh_state(config, plan.architecture, optimizer, plan.mesh), None


def fresh_state(
    config: RunConfig, architecture: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of a run before its first step, on the mesh, which is set.

    Raises:
        ValueError, OSError: as `load_hf`, where the run starts from a checkpoint.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(architecture, optimizer, mesh, config.dtype))
    if config.model.hf is not None:
        model = load_hf(config.model.hf, dtype=config.dtype, mesh=mesh)
    else:
        fresh = init_model(architecture, rngs=nnx.Rngs(config.seed), dtype=config.dtype)
        model = scale_matrices(fresh, config.init_scale)
    begin = jax.jit(lambda model: init_state(model, optimizer), out_shardings=places, donate_argnums=0)
    return begin(model)


def _after_step(
    config: RunConfig,
    checkpoints: Checkpoints,
    preempted: Callable[[int], bool],
    profiler: "_Profiler",
    clock: Clock,
    saved: Callable[[int], None],
    lifeline: Lifeline,
) -> AfterStep:
    """Saves when it is time, or when the run is to stop; then calls `saved` with the step."""
    total = boundaries(config.phases)[-1]

    def after_step(state: TrainState, taken: int, position: Callable[[], Position]) -> bool:
        profiler.after_step(taken, state)
        lifeline.took(taken)
        stop = preempted(taken)
        if stop or taken % config.checkpoints.every == 0 or taken == total:
            note = dataclasses.asdict(position())  # the last step is done: the time to save is only that
            with clock.during("checkpoint"):
                checkpoints.save(taken, state, note)
            saved(taken)
        return stop

    return after_step


def _open_reports(plan: _Plan, taken: int, console: Console, stack: contextlib.ExitStack) -> Report:
    """Terminal, JSON lines, TensorBoard and trackers, with what is measured here added to the records."""
    config, directory = plan.config, plan.directory
    reports: list[Report] = [
        stack.enter_context(JsonLines(directory / layout.METRICS, append=True)),
        stack.enter_context(ProgressView(config.phases, console)),
    ]
    if config.logging.tensorboard:
        reports.append(stack.enter_context(TensorBoard(directory / layout.TENSORBOARD, first_step=taken + 1)))
    trackers = open_trackers(config, directory / layout.TRACKERS, plan.architecture)
    reports += [stack.enter_context(tracker) for tracker in trackers]
    (directory / layout.DIVERGED).unlink(missing_ok=True)
    write = tee(*reports)
    peaks = [peak_flops(device) for device in plan.mesh.devices.flat]
    flops = train_flops(plan.architecture, config.length)

    def report(record: Record) -> None:
        if isinstance(record, TrainRecord):
            used = record.tokens_per_second * flops / sum(filter(None, peaks)) if all(peaks) else None
            record = dataclasses.replace(record, memory=_memory(), utilisation=used)
        elif isinstance(record, EvalRecord):
            record = plan.data.with_bits(record)
        write(record)

    return report


def _ignore(record: Record) -> None:
    """What processes other than the first do with records."""


def _memory() -> int:
    """Bytes, the most held so far: by a device of this process, or by the process where devices do not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Profiler:
    """Has `jax.profiler` look at some steps; a context manager around them."""

    def __init__(self, config: LoggingConfig, directory: Path):
        self._start, self._directory, self._active = config.profile_start, directory, False
        self._stop = None if self._start is None else self._start + config.profile_steps

    def __enter__(self) -> "_Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            jax.profiler.stop_trace()

    def after_step(self, taken: int, state: TrainState) -> None:
        """Starts after step `profile_start`, and stops when the steps to look at are done."""
        if taken == self._start:
            jax.profiler.start_trace(str(self._directory))
            self._active = True
        elif self._active and taken == self._stop:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            self._active = False
