"""`zamba2 train`: a training run from a file."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from zamba2_jax.cli.several import Several, values

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model, or go on with a run that was interrupted.

    The same command does both: a run in whose directory there is a checkpoint goes on from the last one. SIGTERM saves
    a checkpoint and ends the run with exit code 0. Several processes that run the same command make one run together.
    With --restarts the run is in a process of its own, which is started again when it is lost.
    """

    config: Path
    """The run, a TOML file; the config.json of a run will do too."""
    overrides: Annotated[Several[str], tyro.conf.arg(name="set", metavar="KEY=VALUE ...")] = ()
    """Values in place of those in the file, as phases.0.steps=100."""
    distributed: bool = False
    """One of several processes that find each other by themselves, as on TPU pods and under SLURM."""
    coordinator: str | None = None
    """One of several processes: HOST:PORT of the first of them."""
    process_id: int | None = None
    """With --coordinator, which of the processes this is, from 0."""
    process_count: int | None = None
    """With --coordinator, how many there are."""
    restarts: int | None = None
    """Start the run again, from its last checkpoint, when its process is lost: so many times in a row without a step
    that is new."""
    hang_timeout: float | None = None
    """With --restarts, kill a process that takes no step for so many seconds, evaluation and checkpoint included, and
    start it again."""
    skip_diverged: bool = False
    """With --restarts, have a run that diverges go on from the last checkpoint before that, without the batches in
    between."""

    def run(self) -> int:
        """Trains; 0 if the run is done or was told to stop, 1 if it diverged or lost a process.

        Raises:
            ValueError: an option, the config or the data is not valid.
            OSError: a file cannot be read or written.
        """
        if self.restarts is not None:
            return self._supervise(self.restarts)
        if self.hang_timeout is not None or self.skip_diverged:
            raise ValueError("--hang-timeout and --skip-diverged are about restarts: expected --restarts with them")
        import jax

        from zamba2_jax.train.config import load_config
        from zamba2_jax.train.loop import DivergedError
        from zamba2_jax.train.run import run
        from zamba2_jax.train.supervisor import Lifeline

        config = load_config(self.config, values(self.overrides))
        several = self._join()
        console = Console(highlight=False, quiet=jax.process_index() != 0)
        try:
            run(config, console, Lifeline.from_environment())
            return 0
        except DivergedError as error:
            print(f"zamba2: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            if not several:
                raise
            # The others may be gone, and an orderly exit would wait for them.
            print(
                f"zamba2: process {jax.process_index()} of {jax.process_count()} gives up: {error}\n"
                "When the cause is gone, start all processes again with the same command: "
                "the run goes on from its last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2 if isinstance(error, ValueError) else 1)

    def _supervise(self, restarts: int) -> int:
        """Trains in other processes, one after the other."""
        from zamba2_jax.train.supervisor import Policy, supervise

        policy = Policy(restarts=restarts, hang_timeout=self.hang_timeout, skip_diverged=self.skip_diverged)
        words = ["train", "--config", str(self.config), "--set", *values(self.overrides)]
        joining = {"coordinator": self.coordinator, "process-id": self.process_id, "process-count": self.process_count}
        for name, value in joining.items():
            words += [] if value is None else [f"--{name}", str(value)]
        words += ["--distributed"] if self.distributed else []

        def say(text: str) -> None:
            print(f"zamba2: {text}", file=sys.stderr, flush=True)

        return supervise([sys.executable, "-m", "zamba2_jax", *words], policy, say)

    def _join(self) -> bool:
        """Finds the other processes; whether there are any to find."""
        explicit = {
            "--coordinator": self.coordinator,
            "--process-id": self.process_id,
            "--process-count": self.process_count,
        }
        missing = [name for name, value in explicit.items() if value is None]
        if 0 < len(missing) < len(explicit) or (self.distributed and not missing):
            raise ValueError(
                "expected all of --coordinator, --process-id and --process-count, or --distributed, or none"
            )
        if not self.distributed and missing:
            return False
        import jax

        jax.distributed.initialize(
            self.coordinator, self.process_count, self.process_id, heartbeat_timeout_seconds=HEARTBEAT
        )
        return True
