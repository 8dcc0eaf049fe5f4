"""`zamba2 demo`: the whole way from text to a model that writes, in minutes."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from zamba2_jax.choices import Decay
from zamba2_jax.cli.several import Several, values
from zamba2_jax.files import write_atomically, write_json
from zamba2_jax.models.registry import init_model, preset
from zamba2_jax.train import recipe

if TYPE_CHECKING:
    from zamba2_jax.data.batches import Source
    from zamba2_jax.data.corpus import TokenizedCorpus
    from zamba2_jax.evaluate import Necessity
    from zamba2_jax.models.base import LanguageModel
    from zamba2_jax.text.tokenizer import Tokenizer
    from zamba2_jax.train.metrics import HealthRecord, Record
    from zamba2_jax.train.step import TrainState

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

SILENCED = {
    "all.attention": "attention uniform",
    "all.adapters": "adapters at 0",
    "all.shared": "shared blocks at their means",
    "hybrid.mixer": "mixers of hybrid layers at their means",
    "plain.mixer": "mixers of plain layers at their means",
}
"""Parts of a model with shared blocks that are silenced at the end, as the table says it; see `evaluate.necessity`.

Without its MLP a shared block gives the same to every token: the MLPs are worth what the blocks are."""
SILENCED_WITHOUT_CALLS = {
    "all.attention": "attention uniform",
    "all.mixer": "mixers at their means",
    "all.mlp": "MLPs at their means",
}
"""The same of a model without; the mixer of a transformer's layer is its attention."""

PROMPTS = ("The value of", "If a class defines", "When an exception is raised,", "A function is")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small language model on text this Python carries, and let it write.

    Three phases: copying, from which attention learns to look things up; pretraining on the standard library's code;
    annealing on the prose of Python's documentation, with some code and some copying replayed. Then silences one part
    of the model after the other, to see what it needs. Leaves a checkpoint, a Hugging Face export, a picture of the
    run and its numbers. Needs no network.
    """

    output: Path = Path("demo-output")
    """Directory to write to: new, empty, or of an earlier demo, which is replaced."""
    seed: int = 0
    """Seed of the weights, the order of the data and the sampling."""
    steps: tuple[int, int, int] = recipe.STEPS
    """Training steps of copying, of pretraining and of annealing."""
    batch: int = 4
    """Rows per step."""
    seq: int = 128
    """Tokens per row."""
    learning_rate: float = recipe.LEARNING_RATE
    """Peak of the learning rate in the first phases; annealing warms up to three quarters of it."""
    decay: Decay = recipe.DECAY
    """How the learning rate falls in annealing."""
    replay: float = recipe.REPLAY
    """Share of code in annealing."""
    copying: float = recipe.COPYING
    """Share of copying in pretraining and annealing."""
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
        import jax
        from flax import nnx

        from zamba2_jax.data.batches import held_out
        from zamba2_jax.data.corpus import tokenize_embedded_corpus
        from zamba2_jax.data.synthetic import Copying, open_synthetic
        from zamba2_jax.evaluate import necessity, parts
        from zamba2_jax.text.vocabulary import save_tokenizer
        from zamba2_jax.train.curves import plot_run
        from zamba2_jax.train.loop import make_stages, train
        from zamba2_jax.train.metrics import JsonLines, tee
        from zamba2_jax.train.patterns import scale_matrices
        from zamba2_jax.train.progress import ProgressView
        from zamba2_jax.train.schedule import learning_rate
        from zamba2_jax.train.step import compile_train_step, init_state

        begin = time.perf_counter()
        self._check()
        config = preset(self.preset)
        phases = recipe.phases(self.steps, decay=self.decay, replay=self.replay, copying=self.copying)
        schedule, muon = learning_rate(phases, self.learning_rate), recipe.optimizer(config).transformation()
        prepare_output(self.output, dataclasses.asdict(self) | {"output": str(self.output), "prompts": self._prompts})

        console = Console(highlight=False)
        console.print("Reading the corpus, training a tokenizer")
        corpus = tokenize_embedded_corpus(config.vocab_size)
        save_tokenizer(corpus.tokenizer, self.output)
        # A row holds the longest string twice, with a marker between, BOS and EOS.
        longest = min(60, (self.seq - 3) // 2)
        copying = Copying(symbols=64, lengths=(min(3, longest), longest), distinct=True)
        copied = dataclasses.replace(copying, lengths=(-(-longest // 3), longest))
        open_task = partial(open_synthetic, tokenizer=corpus.tokenizer, vocab_size=config.vocab_size)
        sources: dict[str, Source] = {**corpus.train, "copying": open_task(copying)}
        stages = make_stages(phases, sources, batch_size=self.batch, length=self.seq, seed=self.seed)
        texts: dict[str, Source] = {
            "prose": corpus.held_out["prose"],
            "code": corpus.held_out["code"],
            "copying": open_task(copied),
        }
        batches = {name: held_out(text, batch_size=4 * self.batch, length=self.seq) for name, text in texts.items()}

        model = scale_matrices(init_model(config, rngs=nnx.Rngs(self.seed)), recipe.init_scale(config))
        size = sum(parameter.size for parameter in jax.tree.leaves(model))
        console.print(f"Compiling {self.preset}, {size / 1e6:.1f} M parameters")
        state = init_state(model, muon)
        health_every = max(1, sum(self.steps) // 50)
        step = compile_train_step(
            state, next(iter(stages[0].batches)), optimizer=muon, schedule=schedule, health_every=health_every
        )

        records: list[Record] = []
        with JsonLines(self.output / "metrics.jsonl") as write, ProgressView(phases, console) as show:
            state = train(
                state,
                step,
                stages,
                held_out=batches,
                log_every=5,
                eval_every=max(1, sum(self.steps) // 5),
                report=tee(records.append, write, show),
                health_every=health_every,
            )
        save(state, corpus.tokenizer, self.output)
        console.print("Silencing one part of the model after the other")
        words = SILENCED if config.num_calls else SILENCED_WITHOUT_CALLS
        select = [part.name for part in parts(config) if part.name in words]
        needed = {name: necessity(state.model, of_text, select=select) for name, of_text in batches.items()}
        costs = {name: {of.part.name: of.increase for of in found.silenced} for name, found in needed.items()}
        plot_run(records, phases, schedule, self.output / "curves.png", costs=costs)
        self._write(state.model, corpus.tokenizer, console)
        summarize(records, needed, corpus, self.output, console, seconds=time.perf_counter() - begin)
        return 0

    @property
    def _prompts(self) -> tuple[str, ...]:
        return values(self.prompts) or PROMPTS

    def _check(self) -> None:
        """Checks what is not checked before the training starts otherwise."""
        from zamba2_jax.text.vocabulary import MIN_VOCAB_SIZE

        config = preset(self.preset)
        tokens = f"one of at least {MIN_VOCAB_SIZE} tokens, not {config.vocab_size}"
        rules = {
            "preset": (config.vocab_size >= MIN_VOCAB_SIZE, tokens),
            "seed": (0 <= self.seed < 2**31, "an integer in [0, 2^31)"),
            "batch": (self.batch >= 1, "at least 1"),
            "seq": (self.seq >= 9, "at least 9, the room for copying three symbols"),
            "replay": (0 <= self.replay < 1, "a share in [0, 1)"),
            "copying": (0 <= self.copying < 1, "a share in [0, 1)"),
            "new_tokens": (self.new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "a finite number >= 0"),
        }
        for field, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)!r}: expected {rule}")
        if "" in self._prompts:
            raise ValueError("--prompts holds an empty one: expected text")

    def _write(self, model: LanguageModel, tokenizer: Tokenizer, console: Console) -> None:
        """Continues the prompts, on the terminal and in samples.txt."""
        from zamba2_jax.inference.api import generate
        from zamba2_jax.inference.sampling import Sampling

        sampling = Sampling(temperature=self.temperature, seed=self.seed)
        ends = tokenizer.end_tokens
        continuations = generate(model, self._prompts, self.new_tokens, sampling, tokenizer=tokenizer, stop_tokens=ends)
        texts = [prompt + continuation for prompt, continuation in zip(self._prompts, continuations, strict=True)]
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
    from zamba2_jax.checkpoint.hf import save_hf
    from zamba2_jax.checkpoint.store import save_state
    from zamba2_jax.text.vocabulary import save_tokenizer

    save_state(directory / "checkpoint", state)
    save_hf(state.model, directory / "hf")
    save_tokenizer(tokenizer, directory / "hf")


def summarize(
    records: Sequence[Record],
    needed: Mapping[str, Necessity],
    corpus: TokenizedCorpus,
    directory: Path,
    console: Console,
    *,
    seconds: float,
) -> None:
    """Prints what came of the run, and writes it to summary.json.

    Args:
        records: of the run.
        needed: by held-out text, what its loss rises by when a part of the trained model is silenced.
        corpus: that it was trained on.
        directory: of summary.json.
        console: to print to.
        seconds: that all of it took.
    """
    from zamba2_jax.train.metrics import EvalRecord, TrainRecord, bits_per_byte

    train_records = [record for record in records if isinstance(record, TrainRecord)]
    trained, training = (sum(getattr(record, name) for record in train_records) for name in ("tokens", "seconds"))
    held_out: dict[str, dict[str, dict[str, float]]] = {name: {} for name in needed}
    for record in records:
        if isinstance(record, EvalRecord):
            found = {"nats_per_token": record.loss, "accuracy": record.accuracy}
            if record.held_out in corpus.held_out:
                tokens, size = corpus.held_out[record.held_out].tokens, corpus.held_out_sizes[record.held_out]
                found["bits_per_byte"] = bits_per_byte(record.loss, tokens, size)
            held_out[record.held_out][record.phase] = found
    ratios = {layer: call.ratio for layer, call in _last_health(records).calls.items()}
    summary = {
        "held_out": held_out,
        "necessity": {name: found.as_dict() for name, found in needed.items()},
        "shared_output_over_residual": ratios,
        "tokens": trained,
        "tokens_per_second": trained / training,
        "training_seconds": training,
        "seconds": seconds,
        "skipped_steps": train_records[-1].skipped,
    }
    write_json(directory / "summary.json", summary)

    losses = Table("after", "nats per token", "bits per byte", title="Loss on held-out prose", title_justify="left")
    for phase, of_phase in held_out["prose"].items():
        losses.add_row(phase, f"{of_phase['nats_per_token']:.3f}", f"{of_phase['bits_per_byte']:.3f}")
    costs = Table("silenced", title="What it needs: nats per token that the loss rises by", title_justify="left")
    for name in needed:
        costs.add_column(name, justify="right")
    copied = needed["copying"]
    for part in (of.part.name for of in copied.silenced):
        words = (SILENCED | SILENCED_WITHOUT_CALLS)[part]
        costs.add_row(words, *(f"{found[part].increase:+.3f}" for found in needed.values()))
    for table in (losses, costs):
        console.print()
        console.print(table)
    console.print(f"\nIt copies strings of symbols that it has never seen: {copied.accuracy:.0%} of the symbols right.")
    for of in copied.silenced:
        if of.part.kind == "attention":
            console.print(f"With attention silenced, every token looking at all before it alike: {of.accuracy:.0%}.")
    if ratios:
        _print_ratios(ratios.values(), console)
    console.print(f"{trained:,} tokens at {trained / training:,.0f} tokens/s; {seconds:.0f} s in all")
    console.print(f"Written to {directory}: {', '.join(OUTPUTS)}", soft_wrap=True)


def _last_health(records: Sequence[Record]) -> HealthRecord:
    from zamba2_jax.train.metrics import HealthRecord

    return [record for record in records if isinstance(record, HealthRecord)][-1]


def _print_ratios(ratios: Collection[float], console: Console) -> None:
    """Says how large the shared blocks' output is, and whether that is healthy."""
    from zamba2_jax.train.metrics import HEALTHY_RATIOS

    low, high, (idle, drowned) = min(ratios), max(ratios), HEALTHY_RATIOS
    healthy = idle <= low and high <= drowned
    console.print(
        f"What its shared blocks add to their layers' input is {low:.2g} to {high:.2g} times the residual stream; "
        f"{'healthy' if healthy else 'NOT healthy, see docs/health.md: healthy'} is {idle:g} to {drowned:g}.",
        soft_wrap=True,
    )


def _is_output(name: str) -> bool:
    """Whether the demo writes this name, or leaves it behind when it is killed while writing."""
    partial = name.startswith((*(f".{Path(output).stem}." for output in OUTPUTS), "checkpoint.orbax-checkpoint-tmp"))
    return name in OUTPUTS or partial
