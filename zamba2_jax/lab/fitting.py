"""`fit`: trains variants with seeds, those of one shape together, and says what came of them."""

import contextlib
import dataclasses
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich.console import Console

from zamba2_jax.evaluate.silencing import necessity as measure_necessity
from zamba2_jax.evaluate.silencing import parts
from zamba2_jax.lab.progress import Progress
from zamba2_jax.lab.result import (
    MODEL,
    RESULT,
    SWEEP,
    Outcome,
    Result,
    read_outcome,
    write_model,
    write_result,
    write_sweep,
)
from zamba2_jax.lab.together import (
    Group,
    Program,
    Together,
    available_memory,
    compile_group,
    default_together,
    make_groups,
    state_bytes,
)
from zamba2_jax.lab.trials import Trial, make_trials, named_configs
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import config_json, init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.parallel.hosts import run_mesh
from zamba2_jax.parallel.mesh import check_mesh
from zamba2_jax.text.tokenizer import Tokenizer
from zamba2_jax.train import directory as layout
from zamba2_jax.train.config import RunConfig, differing
from zamba2_jax.train.loop import DivergedError, train
from zamba2_jax.train.metrics import EvalRecord, JsonLines, Record, Report, as_line
from zamba2_jax.train.run import Data, check_names, open_data
from zamba2_jax.train.step import evaluate

OnRecord = Callable[[str, Record], None]
"""Is given the name of a run, as "wide/seed-3", and each of its records; by one thread at a time."""


def fit(
    configs: RunConfig | ModelConfig | Mapping[str, RunConfig | ModelConfig],
    *,
    seeds: Sequence[int] = (0,),
    overrides: Mapping[str, Any] | None = None,
    necessity: Sequence[str] = (),
    baseline: str | None = None,
    directory: Path | str | None = None,
    together: Together | None = None,
    report: OnRecord | None = None,
    console: Console | None = None,
) -> Result:
    """Trains every variant with every seed, and gives what came of it, with the spread over the seeds.

    Runs whose program is the same, differing in seeds, learning rates, phases, data or the scale of initial matrices
    alone, are trained together; others in turn. Each does what `zamba2 train` does with its config: the same batches,
    weights, records and final evaluation, but for rounding. Of checkpoints there is the final model alone.

    All that can be wrong is found before the first step. A run that diverges is reported as such, and the others go on.

    Args:
        configs: a run, or several by name. An architecture is trained by the recipe, see `recipe.run_config`.
        seeds: of the initial weights and, where a config has no `data_seed`, of the data. The same for all variants.
        overrides: values for keys of all configs, as "learning_rate" or "model.num_layers"; lists make a grid, see
            `lab.trials.named_configs`.
        necessity: patterns of parts, as "all.*"; each final model's need of them is measured on every held-out source,
            see `evaluate.necessity`.
        baseline: the variant that the result compares others with.
        directory: where each run is written as it goes, and from which runs that are done are read, not trained again.
            Without one all is held in memory.
        together: how runs are trained together; see `lab.together`. By default the fastest on the platform.
        report: is given all records as they come.
        console: where progress is shown; standard output by default.

    Raises:
        ValueError: a config, the data or an argument is not valid, two variants have one name, or one does not fit the
            mesh or the memory; the message names the variant. Or a run of another config is in the directory.
        OSError: a file cannot be read or written.
    """
    variants = named_configs(configs, overrides)
    return fit_variants(
        variants,
        seeds=seeds,
        necessity=necessity,
        baseline=baseline,
        directory=directory,
        together=together,
        report=report,
        console=console,
    )


def fit_variants(
    variants: Mapping[str, RunConfig],
    *,
    seeds: Sequence[int],
    necessity: Sequence[str],
    baseline: str | None,
    directory: Path | str | None,
    together: Together | None,
    report: OnRecord | None,
    console: Console | None,
) -> Result:
    """`fit` of variants by name."""
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: expected one")
    trials = make_trials(variants, seeds)
    if baseline is not None and baseline not in variants:
        raise ValueError(f"baseline={baseline!r}: expected one of {', '.join(variants)}")
    home = None if directory is None else Path(directory).resolve()
    with contextlib.ExitStack() as stack:
        if home is not None:
            stack.enter_context(layout.claim(home, marker=SWEEP, names=()))
            trials = [
                trial._replace(config=dataclasses.replace(trial.config, directory=str(home / trial.name)))
                for trial in trials
            ]
        session = _Session(tuple(necessity), home, report)
        done = {} if home is None else session.read_done(trials)
        left = [trial for trial in trials if trial.name not in done]
        groups = session.prepare(left)
        if home is not None:
            write_sweep(home, [trial.name for trial in trials], baseline)
        progress = stack.enter_context(Progress(trials, done.values(), console or Console(highlight=False)))
        programs = session.compile(groups, together or default_together(), progress)
        while programs:
            group, program = programs.pop(0)
            done |= session.run(group, program, progress)
        return Result(outcomes=tuple(done[trial.name] for trial in trials), baseline=baseline)


class _Reads(NamedTuple):
    """What a trial reads."""

    data: Data
    tokenizer: Tokenizer | None


class _Session:
    """The runs of one call of `fit`."""

    def __init__(self, necessity: tuple[str, ...], home: Path | None, report: OnRecord | None):
        self._necessity, self._home, self._report = necessity, home, report
        self._reads: dict[str, _Reads] = {}
        self._stop = threading.Event()
        self._lock, self._measuring = threading.Lock(), threading.Lock()

    def read_done(self, trials: Sequence[Trial]) -> dict[str, Outcome]:
        """The outcomes of runs that are done, by name.

        Raises:
            ValueError: the run in a directory is another one.
            OSError: a file cannot be read.
        """
        found = {}
        for trial in trials:
            directory = Path(trial.config.directory)
            if not (directory / layout.CONFIG).is_file():
                names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
                foreign = [name for name in names if name not in layout.NAMES and name[0] != "."]
                if foreign:  # tokenizer and architecture are there if a process was killed as it began
                    raise FileExistsError(f"{directory} holds {', '.join(foreign[:3])}: expected a new directory")
                continue
            before, _ = layout.read_run(directory)
            lines = differing(before.as_dict(), trial.config.as_dict(), free=("directory", "logging", "checkpoints"))
            if (directory / RESULT).is_file():
                outcome = read_outcome(directory)
                if outcome.status == "finished" and not self._has_all(trial, outcome):
                    lines.append(f"necessity: of other parts before, of {', '.join(self._necessity)} now")
                found[trial.name] = outcome
            if lines:
                raise ValueError(
                    f"variant {trial.variant!r}: the run in {directory} has another config:\n  " + "\n  ".join(lines)
                )
        return found

    def _has_all(self, trial: Trial, outcome: Outcome) -> bool:
        """Whether the need of all parts that are asked for was measured."""
        wanted = {
            part.name
            for part in parts(trial.config.model.resolve())
            if any(fnmatchcase(part.name, pattern) for pattern in self._necessity)
        }
        sources = trial.config.evaluation.sources
        return all(wanted <= outcome.necessity.get(name, {}).get("silenced", {}).keys() for name in sources)

    def prepare(self, trials: Sequence[Trial]) -> list[Group]:
        """Finds what is wrong with configs and data, and puts trials of one program together.

        Raises:
            ValueError, OSError: as `fit`.
        """
        architectures = []
        for trial in trials:
            with _naming(trial):
                architectures.append(self._check(trial))
        return make_groups(trials, architectures)

    def _check(self, trial: Trial) -> ModelConfig:
        config = trial.config
        architecture, mesh = config.model.resolve(), run_mesh(config.mesh)
        check_mesh(architecture, mesh, batch=config.batch_size, length=config.length)
        check_names(config, architecture)
        if self._home is not None:
            config_json(architecture)
        known = [part.name for part in parts(architecture)]
        for pattern in self._necessity:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"necessity: {pattern!r} matches no part: expected names as {', '.join(known)}")
        if self._necessity and mesh.size > 1:
            raise ValueError(f"necessity={list(self._necessity)}: expected none with a mesh of {mesh.size} devices")
        key = self._key(config, architecture)
        if key not in self._reads:
            tokenizer = layout.open_tokenizer(config, None, architecture.vocab_size)
            with jax.set_mesh(mesh):
                self._reads[key] = _Reads(open_data(config, tokenizer, architecture.vocab_size, mesh), tokenizer)
        reads = self._reads[key]
        reads.data.stages(config, mesh)
        return architecture

    @staticmethod
    def _key(config: RunConfig, architecture: ModelConfig) -> str:
        """Of all that the data depends on."""
        table = config.as_dict()
        names = ("sources", "evaluation", "tokenizer", "batch_size", "length", "mesh")
        return json.dumps([architecture.vocab_size, config.model.hf, {name: table[name] for name in names}])

    def compile(self, groups: Sequence[Group], together: Together, progress: Progress) -> list[tuple[Group, Program]]:
        """The programs of all groups, before any takes a step.

        Raises:
            ValueError: a group does not fit into the memory.
        """
        room = available_memory()

        def check(group: Group, needed: int) -> None:
            if room is not None and needed > room:
                names = "variant" if len({trial.variant for trial in group.trials}) == 1 else "variants"
                raise ValueError(
                    f"{names} {group}: {needed / 1e9:.1f} GB are needed, {room / 1e9:.1f} GB are free: expected a "
                    "smaller model or batch, more step.microbatches or together='turn'"
                )

        for group in groups:
            check(group, state_bytes(group))
        programs = []
        for number, group in enumerate(groups, 1):
            progress.say(f"Compiling program {number} of {len(groups)}, for {len(group.trials)} runs of {group}")
            program = compile_group(group, together)
            check(group, program.memory)
            programs.append((group, program))
        return programs

    def run(self, group: Group, program: Program, progress: Progress) -> dict[str, Outcome]:
        """Trains the trials of a group; their outcomes by name.

        Raises:
            Exception: what one of them raised, when the others have stopped.
        """
        with ThreadPoolExecutor(program.workers, thread_name_prefix="fit") as pool:
            futures = []
            try:
                self._warm(group, program)
                futures = [pool.submit(self._run_trial, trial, group, program, progress) for trial in group.trials]
                wait(futures, return_when="FIRST_EXCEPTION")
            finally:
                if not futures or not all(future.done() and not future.exception() for future in futures):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, _StoppedError)), errors[0])
        return {outcome.name: outcome for outcome in (future.result() for future in futures)}

    def _warm(self, group: Group, program: Program) -> None:
        """Compiles the evaluation of a group's models, which all threads would else begin with."""
        trial = group.trials[0]
        held_out = self._reads[self._key(trial.config, group.architecture)].data.held_out
        for rows in list(held_out.values())[:1]:
            with jax.set_mesh(program.mesh):
                model = init_model(group.architecture, rngs=nnx.Rngs(0), dtype=trial.config.dtype)
                evaluate(model, rows[:1], trial.config.step)

    def _run_trial(self, trial: Trial, group: Group, program: Program, progress: Progress) -> Outcome:
        """Trains, measures and writes one run."""
        config, begin = trial.config, time.perf_counter()
        reads = self._reads[self._key(config, group.architecture)]
        records: list[Record] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(program.mesh))
            write = stack.enter_context(self._writer(trial, group, reads))

            def report(record: Record) -> None:
                record = reads.data.with_bits(record) if isinstance(record, EvalRecord) else record
                records.append(record)
                write(record)
                with self._lock:
                    progress(trial, record)
                    if self._report is not None:
                        self._report(trial.name, record)

            model, error = self._train(trial, program, reads.data, report)
            seconds = time.perf_counter() - begin
            needed = {} if model is None else self._needed(model, reads.data)
            outcome = Outcome(
                variant=trial.variant,
                seed=trial.seed,
                config=config,
                status="finished" if model is not None else "diverged",
                error=error,
                metrics={} if model is None else _final_metrics(records, needed),
                records=tuple(map(as_line, records)),
                necessity=needed,
                seconds=seconds,
                trained=model if self._home is None else None,
                tokenizer=reads.tokenizer if self._home is None else None,
                directory=None if self._home is None else Path(config.directory),
            )
            if self._home is not None:
                if model is not None:
                    write_model(model, reads.tokenizer, Path(config.directory))
                write_result(outcome, Path(config.directory))
        with self._lock:
            progress.finish(outcome)
        return outcome

    def _train(
        self, trial: Trial, program: Program, data: Data, report: Report
    ) -> tuple[LanguageModel | None, str | None]:
        """The model at the end of a run; or None, and how the run diverged.

        Raises:
            _StoppedError: another run has failed meanwhile.
        """
        config = trial.config
        try:
            state, step = program.begin(trial)
            state = train(
                state,
                step,
                data.stages(config, program.mesh),
                held_out=data.held_out,
                log_every=config.logging.every,
                eval_every=config.evaluation.every,
                report=report,
                health_every=config.logging.health_every or None,
                after_step=lambda state, taken, position: self._stop.is_set(),
                max_skipped=config.max_skipped,
                step_config=config.step,
            )
            if self._stop.is_set():
                raise _StoppedError(trial.name)
            return state.model, None
        except DivergedError as diverged:
            return None, str(diverged)
        finally:
            program.leave(trial)

    @contextlib.contextmanager
    def _writer(self, trial: Trial, group: Group, reads: _Reads) -> Iterator[Report]:
        """Begins the directory of a run anew, and writes its records to it."""
        if self._home is None:
            yield lambda record: None
            return
        directory = Path(trial.config.directory)
        for name in (MODEL, f".{MODEL}.partial", f".{layout.TOKENIZER}.partial"):
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
        directory.mkdir(parents=True, exist_ok=True)
        with self._lock:
            layout.write_run(trial.config, group.architecture, reads.tokenizer, directory)
        with JsonLines(directory / layout.METRICS) as write:
            yield write

    def _needed(self, model: LanguageModel, data: Data) -> dict[str, dict[str, Any]]:
        """What the losses on the held-out sources rise by, if that was asked for; one run at a time, compiled once."""
        if not self._necessity:
            return {}
        with self._measuring:
            return {
                name: measure_necessity(model, rows, select=self._necessity).as_dict()
                for name, rows in data.held_out.items()
            }


class _StoppedError(RuntimeError):
    """A run was stopped as another one failed."""


def _final_metrics(records: Sequence[Record], needed: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the last evaluation of each source, and what silencing costs; those that are finite."""
    found: dict[str, float | None] = {}
    for record in records:
        if isinstance(record, EvalRecord):
            for key in ("loss", "accuracy", "bits_per_byte"):
                found[f"{record.held_out}.{key}"] = getattr(record, key)
    for source, of_source in needed.items():
        for part, numbers in of_source["silenced"].items():
            found[f"necessity.{source}.{part}"] = numbers["increase"]
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


@contextlib.contextmanager
def _naming(trial: Trial) -> Iterator[None]:
    """Errors begin with the variant."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"variant {trial.variant!r}: {error}") from error
