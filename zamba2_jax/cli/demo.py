"""`zamba2 demo`: the whole way from text to a model that writes, in minutes."""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from zamba2_jax.checkpoint.hf import save_hf
from zamba2_jax.checkpoint.store import save_state
from zamba2_jax.cli.several import Several, values
from zamba2_jax.config import Zamba2Config
from zamba2_jax.generate import Sampling, generate
from zamba2_jax.model import Zamba2
from zamba2_jax.train.config import LoggingConfig
from zamba2_jax.train.corpus import TokenizedCorpus, tokenize_embedded_corpus
from zamba2_jax.train.curves import plot_curves
from zamba2_jax.train.data import held_out
from zamba2_jax.train.files import write_atomically, write_json
from zamba2_jax.train.loop import make_stages, train
from zamba2_jax.train.metrics import EvalRecord, JsonLines, Record, TrainRecord, bits_per_byte, tee
from zamba2_jax.train.optimizer import AdamW
from zamba2_jax.train.progress import ProgressView
from zamba2_jax.train.schedule import Decay, Phase, learning_rate
from zamba2_jax.train.step import TrainState, compile_train_step, init_state
from zamba2_jax.train.tokenizer import BOS, EOS, MIN_VOCAB_SIZE, save_tokenizer

MARKER = "demo.json"
OUTPUTS = (
    MARKER,
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "checkpoint",
    "hf",
    "curves.png",
    "samples.txt",
    "summary.json",
)
"""All that the demo writes; the marker, with the settings, first."""

PROMPTS = ("The value of", "If a class defines", "When an exception is raised,", "A function is")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small Zamba2 on text this Python carries, and let it write.

    Two phases, as the released models were trained: pretraining on the standard library's code, then annealing on the
    prose of Python's documentation with some code replayed. Leaves a checkpoint, a Hugging Face export, a picture of
    the run and its numbers. Needs no network.
    """

    output: Path = Path("demo-output")
    """Directory to write to: new, empty, or of an earlier demo, which is replaced."""
    seed: int = 0
    """Seed of the weights, the order of the data and the sampling."""
    steps: tuple[int, int] = (240, 760)
    """Training steps of pretraining and of annealing."""
    batch: int = 4
    """Rows per step."""
    seq: int = 128
    """Tokens per row."""
    learning_rate: float = 1e-2
    """Peak of the learning rate in pretraining; annealing warms up to three quarters of it."""
    decay: Decay = "linear"
    """How the learning rate falls in annealing."""
    replay: float = 0.2
    """Share of code in annealing."""
    preset: str = "zamba2-nano"
    """Architecture, by name."""
    prompts: Annotated[Several[str], tyro.conf.arg(metavar="TEXT ...")] = ()
    """What the model is to continue, in place of the beginnings of four sentences about Python."""
    new_tokens: int = 80
    """Tokens it adds to each prompt."""
    temperature: float = 0.5
    """Of the sampling; 0 takes the likeliest token."""

    def run(self) -> int:
        """Trains, saves and prints; returns 0.

        Raises:
            ValueError: an option is not valid.
            OSError: the output directory is in use for something else, or cannot be written to.
        """
        begin = time.perf_counter()
        self._check()
        config, phases = Zamba2Config.preset(self.preset), self._phases()
        schedule, optimizer = learning_rate(phases, self.learning_rate), AdamW().transformation()
        prepare_output(self.output, dataclasses.asdict(self) | {"output": str(self.output), "prompts": self._prompts})

        console = Console(highlight=False)
        console.print("Reading the corpus, training a tokenizer")
        corpus = tokenize_embedded_corpus(config.vocab_size)
        save_tokenizer(corpus.tokenizer, self.output)
        stages = make_stages(phases, corpus.train, batch_size=self.batch, length=self.seq, seed=self.seed)
        held_out_prose = held_out(corpus.held_out, batch_size=4 * self.batch, length=self.seq)

        model = Zamba2(config, rngs=nnx.Rngs(self.seed))
        size = sum(parameter.size for parameter in jax.tree.leaves(model))
        console.print(f"Compiling {self.preset}, {size / 1e6:.1f} M parameters")
        state = init_state(model, optimizer)
        step = compile_train_step(
            state,
            next(iter(stages[0].batches)),
            optimizer=optimizer,
            schedule=schedule,
            health_every=LoggingConfig.health_every,
        )

        records: list[Record] = []
        with JsonLines(self.output / "metrics.jsonl") as write, ProgressView(phases, console) as show:
            state = train(
                state,
                step,
                stages,
                held_out={"prose": held_out_prose},
                log_every=5,
                eval_every=max(1, sum(self.steps) // 8),
                health_every=LoggingConfig.health_every,
                report=tee(records.append, write, show),
            )
        save(state, corpus.tokenizer, self.output)
        plot_curves(records, phases, schedule, self.output / "curves.png")
        self._write(state.model, corpus.tokenizer, console)
        summarize(records, corpus, self.output, console, seconds=time.perf_counter() - begin)
        return 0

    @property
    def _prompts(self) -> tuple[str, ...]:
        return values(self.prompts) or PROMPTS

    def _check(self) -> None:
        """Checks what is not checked before the training starts otherwise."""
        vocab_size = Zamba2Config.preset(self.preset).vocab_size
        rules = {
            "preset": (vocab_size >= MIN_VOCAB_SIZE, f"one of at least {MIN_VOCAB_SIZE} tokens, not {vocab_size}"),
            "seed": (0 <= self.seed < 2**31, "an integer in [0, 2^31)"),
            "batch": (self.batch >= 1, "at least 1"),
            "seq": (self.seq >= 2, "at least 2"),
            "replay": (0 <= self.replay < 1, "a share in [0, 1)"),
            "new_tokens": (self.new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "a finite number >= 0"),
        }
        for field, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)!r}: expected {rule}")
        if "" in self._prompts:
            raise ValueError("--prompts holds an empty one: expected text")

    def _phases(self) -> list[Phase]:
        pretraining, annealing = self.steps
        return [
            Phase(
                name="pretraining",
                steps=pretraining,
                shares={"code": 1.0},
                warmup_steps=pretraining // 10,
                decay="cosine",
                final_fraction=0.1,
            ),
            Phase(
                name="annealing",
                steps=annealing,
                shares={"prose": 1 - self.replay, "code": self.replay},
                warmup_steps=annealing // 20,
                peak_fraction=0.75,
                decay=self.decay,
                final_fraction=0.01,
            ),
        ]

    def _write(self, model: Zamba2, tokenizer: Tokenizer, console: Console) -> None:
        """Continues the prompts, on the terminal and in samples.txt."""
        prompts = [[BOS, *tokenizer.encode(prompt).ids] for prompt in self._prompts]
        sampling = Sampling(temperature=self.temperature, seed=self.seed)
        continuations = generate(model, prompts, self.new_tokens, sampling, stop_tokens=[EOS])
        texts = [
            prompt + tokenizer.decode(tokens)  # EOS, which may be last, is left out as a special token
            for prompt, tokens in zip(self._prompts, continuations, strict=True)
        ]
        for prompt, text in zip(self._prompts, texts, strict=True):
            console.print()
            console.print(prompt, style="bold", markup=False, end="", soft_wrap=True)
            console.print(text[len(prompt) :], markup=False, soft_wrap=True)
        samples = "\n\n---\n\n".join(texts) + "\n"
        write_atomically(self.output / "samples.txt", lambda path: path.write_text(samples, encoding="utf-8"))


def prepare_output(directory: Path, settings: dict[str, Any]) -> None:
    """Makes `directory` ready for a new demo: empty but for the marker, which holds the settings.

    Raises:
        FileExistsError: the directory holds what no earlier demo wrote.
        OSError: it cannot be made or written to.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory to write to")
    directory.mkdir(parents=True, exist_ok=True)
    present = {path.name: path for path in directory.iterdir()}
    foreign = sorted(name for name in present if not _is_output(name)) if MARKER in present else sorted(present)
    if foreign:
        listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise FileExistsError(
            f"{directory} holds {listed}: expected a new or an empty directory, or the output of an earlier demo alone"
        )
    for name, path in present.items():
        if name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(directory / MARKER, settings)


def save(state: TrainState, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the training state, and the model as a Hugging Face checkpoint with its tokenizer."""
    save_state(directory / "checkpoint", state)
    save_hf(state.model, directory / "hf")
    save_tokenizer(tokenizer, directory / "hf")


def summarize(
    records: Sequence[Record], corpus: TokenizedCorpus, directory: Path, console: Console, *, seconds: float
) -> None:
    """Prints what came of the run, and writes it to summary.json."""
    losses = {record.phase: record.loss for record in records if isinstance(record, EvalRecord)}
    train_records = [record for record in records if isinstance(record, TrainRecord)]
    trained, training = (sum(getattr(record, name) for record in train_records) for name in ("tokens", "seconds"))
    table = Table("after", "nats per token", "bits per byte", title="Loss on held-out prose", title_justify="left")
    summary: dict[str, Any] = {"held_out_prose": {}}
    for phase, loss in losses.items():
        bits = bits_per_byte(loss, corpus.held_out.tokens, corpus.held_out_size)
        table.add_row(phase, f"{loss:.3f}", f"{bits:.3f}")
        summary["held_out_prose"][phase] = {"nats_per_token": loss, "bits_per_byte": bits}
    summary |= {
        "tokens": trained,
        "tokens_per_second": trained / training,
        "training_seconds": training,
        "seconds": seconds,
        "skipped_steps": train_records[-1].skipped,
    }
    write_json(directory / "summary.json", summary)
    console.print()
    console.print(table)
    console.print(f"{trained:,} tokens at {trained / training:,.0f} tokens/s; {seconds:.0f} s in all")
    console.print(f"Written to {directory}: {', '.join(OUTPUTS)}", soft_wrap=True)


def _is_output(name: str) -> bool:
    """Whether the demo writes this name, or leaves it behind when it is killed while writing."""
    partial = name.startswith((*(f".{Path(output).stem}." for output in OUTPUTS), "checkpoint.orbax-checkpoint-tmp"))
    return name in OUTPUTS or partial
