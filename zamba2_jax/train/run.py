"""A training run from its config to its last checkpoint, over a mesh, to be stopped and started at will."""

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from tokenizers import Tokenizer

from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.checkpoint.history import Checkpoints
from zamba2_jax.config import Zamba2Config
from zamba2_jax.model import Zamba2
from zamba2_jax.sharding import check_mesh, parameter_sharding
from zamba2_jax.train import directory as layout
from zamba2_jax.train.config import LoggingConfig, RunConfig
from zamba2_jax.train.data import Batch, held_out
from zamba2_jax.train.documents import Documents
from zamba2_jax.train.flops import peak_flops, train_flops
from zamba2_jax.train.hosts import batch_sharding, host_share, place, preemption, run_mesh
from zamba2_jax.train.loop import AfterStep, DivergedError, Position, make_stages, train
from zamba2_jax.train.metrics import JsonLines, Record, Report, TensorBoard, TrainRecord, tee
from zamba2_jax.train.progress import ProgressView
from zamba2_jax.train.schedule import boundaries, learning_rate
from zamba2_jax.train.sources import SourceConfig, open_documents
from zamba2_jax.train.step import TrainState, compile_train_step, init_state


def run(config: RunConfig, console: Console) -> bool:
    """Trains from where the run in `config.directory` stands, or from the beginning, to the end.

    Everything that can be wrong with config, data, mesh and directory is found before the first step. With several
    processes each of them calls this, and the directory is one they share.

    Args:
        config: of the run.
        console: where to show it; one that is quiet in all processes but the first.

    Returns:
        Whether the run is done; if not, it was told to stop by SIGTERM, and has left a checkpoint.

    Raises:
        ValueError: the config, the data or the mesh is not valid, or the run in the directory is another one.
        OSError: a file or directory cannot be read or written; with a checkpoint the last good one is named.
        DivergedError: `config.max_skipped` steps in a row were not finite.
    """
    directory, is_first = Path(config.directory).resolve(), jax.process_index() == 0
    mesh = run_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        preempted = stack.enter_context(preemption())
        if is_first:
            stack.enter_context(layout.claim(directory))
        architecture = layout.resolve_architecture(config, directory)
        check_mesh(architecture, mesh, batch=config.batch_size, length=config.length)
        share = host_share(mesh, config.batch_size, config.length)
        console.print("Opening the data")
        tokenizer = layout.open_tokenizer(config, directory, architecture.vocab_size)
        sources = _open(config.sources, tokenizer, architecture)
        stages = make_stages(
            config.phases, sources, batch_size=config.batch_size, length=config.length, seed=config.seed, share=share
        )
        unseen = _held_out(config, _open(config.evaluation.sources, tokenizer, architecture), mesh)
        if is_first:
            layout.write_run(config, architecture, tokenizer, directory)

        stack.enter_context(jax.set_mesh(mesh))
        keep = config.checkpoints
        checkpoints = stack.enter_context(
            Checkpoints(directory / layout.CHECKPOINTS, keep_last=keep.keep_last, keep_every=keep.keep_every)
        )
        optimizer, total = config.optimizer.transformation(), boundaries(config.phases)[-1]
        taken = checkpoints.steps[-1] if checkpoints.steps else 0
        if taken >= total:
            console.print(f"All {total} steps are done", highlight=False)
            return True
        console.print(f"Compiling; {taken} of {total} steps are done", highlight=False)
        state, start = _start(config, architecture, mesh, optimizer, checkpoints)
        step = compile_train_step(
            state,
            _abstract_batch(config, mesh),
            optimizer=optimizer,
            schedule=learning_rate(config.phases, config.learning_rate),
        )
        report = _open_reports(config, architecture, directory, taken, console, stack) if is_first else _ignore
        profiler = stack.enter_context(_Profiler(config.logging, directory / layout.PROFILE))
        try:
            state = train(
                state,
                lambda state, batch: step(state, place(batch, mesh, config.batch_size)),
                stages,
                held_out=unseen,
                log_every=config.logging.every,
                eval_every=config.evaluation.every,
                report=report,
                start=start,
                after_step=_after_step(config, checkpoints, preempted, profiler),
                max_skipped=config.max_skipped,
            )
        except DivergedError as error:
            checkpoints.wait()
            kept = f"the last checkpoint is {checkpoints.latest}" if checkpoints.steps else "there is no checkpoint yet"
            raise DivergedError(f"{error}; {kept}") from error
        checkpoints.wait()
        taken = int(state.step)
        console.print(f"{taken} of {total} steps are done; the last checkpoint is {checkpoints.latest}", soft_wrap=True)
        return taken == total


def abstract_state(config: Zamba2Config, optimizer: optax.GradientTransformation, mesh: Mesh, dtype: str) -> TrainState:
    """Shapes, dtypes and places of a training state; moments of the optimizer are where their parameters are."""
    state = jax.eval_shape(lambda: init_state(_random_model(config, 0, dtype), optimizer))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: nnx.Variable | jax.ShapeDtypeStruct) -> nnx.Variable | jax.ShapeDtypeStruct:
        if not isinstance(leaf, nnx.Param):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter_sharding(leaf, mesh)))

    return jax.tree.map(placed, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _start(
    config: RunConfig,
    architecture: Zamba2Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Position | None]:
    """The state to go on from, and where it stands: the last checkpoint, or else the beginning."""
    like = abstract_state(architecture, optimizer, mesh, config.dtype)
    if checkpoints.steps:
        state, note = checkpoints.restore(checkpoints.steps[-1], like)
        return state, Position(**note)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    if config.model.hf is not None:
        model = load_hf(config.model.hf, dtype=config.dtype, mesh=mesh)
        return jax.jit(lambda model: init_state(model, optimizer), out_shardings=shardings)(model), None

    def init() -> TrainState:
        return init_state(_random_model(architecture, config.seed, config.dtype), optimizer)

    return jax.jit(init, out_shardings=shardings)(), None


def _random_model(config: Zamba2Config, seed: int, dtype: str) -> Zamba2:
    return Zamba2(config, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype))


def _open(
    sources: Mapping[str, SourceConfig], tokenizer: Tokenizer | None, architecture: Zamba2Config
) -> dict[str, Documents]:
    return {
        name: open_documents(source, tokenizer, vocab_size=architecture.vocab_size) for name, source in sources.items()
    }


def _held_out(config: RunConfig, sources: Mapping[str, Documents], mesh: Mesh) -> dict[str, list[Batch]]:
    """All held-out batches, on the mesh."""
    return {
        name: [
            place(batch, mesh, config.batch_size)
            for batch in held_out(documents, batch_size=config.batch_size, length=config.length)
        ]
        for name, documents in sources.items()
    }


def _abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    ids = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32, sharding=batch_sharding(mesh))
    return Batch(tokens=cast(np.ndarray, ids), segment_ids=cast(np.ndarray, ids))


def _after_step(
    config: RunConfig, checkpoints: Checkpoints, preempted: Callable[[int], bool], profiler: "_Profiler"
) -> AfterStep:
    """Saves when it is time, or when the run is to stop."""
    total = boundaries(config.phases)[-1]

    def after_step(state: TrainState, taken: int, position: Callable[[], Position]) -> bool:
        profiler.after_step(taken, state)
        stop = preempted(taken)
        if stop or taken % config.checkpoints.every == 0 or taken == total:
            checkpoints.save(taken, state, dataclasses.asdict(position()))
        return stop

    return after_step


def _open_reports(
    config: RunConfig,
    architecture: Zamba2Config,
    directory: Path,
    taken: int,
    console: Console,
    stack: contextlib.ExitStack,
) -> Report:
    """Terminal, JSON lines and TensorBoard, with what is measured here added to the records."""
    reports: list[Report] = [
        stack.enter_context(JsonLines(directory / layout.METRICS, append=True)),
        stack.enter_context(ProgressView(config.phases, console)),
    ]
    if config.logging.tensorboard:
        reports.append(stack.enter_context(TensorBoard(directory / layout.TENSORBOARD, first_step=taken + 1)))
    write = tee(*reports)
    peaks = [peak_flops(device) for device in jax.devices()[: config.mesh.size]]
    flops = train_flops(architecture, config.length)

    def report(record: Record) -> None:
        if isinstance(record, TrainRecord):
            used = record.tokens_per_second * flops / sum(filter(None, peaks)) if all(peaks) else None
            record = dataclasses.replace(record, memory=_memory(), utilisation=used)
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
