"""Runs both sides and the oracle on one case, and gives a verdict."""

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from zamba2_jax.checkpoint.hf import load_hf, save_hf
from zamba2_jax.parity import ours, reference
from zamba2_jax.parity.case import Case
from zamba2_jax.parity.evidence import GROUPS, Evidence, Items, Row, compare, summarize
from zamba2_jax.parity.families import reference_family
from zamba2_jax.parity.layerwise import ORACLE, evidence, parts_of, with_settings


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a side may differ by.

    Attributes:
        logits: largest relative error of our logits against PyTorch's.
        gradient: largest relative error of our gradient of any one parameter against PyTorch's.
        apart: largest relative error of anything against PyTorch's or the oracle's. Beyond it a side is wrong, or they
            do not mean the same.
        ratio: our error against the oracle over PyTorch's, for every kind of evidence.
        exact: an error against the oracle below this is exact enough, whatever PyTorch's is.
        loss: the same for the loss, a single number, whose error says little against another's.
        greedy: whether greedy tokens must be the same.
    """

    logits: float
    gradient: float
    apart: float
    ratio: float
    exact: float
    loss: float
    greedy: bool


def limits_for(dtype: str, *, full: bool) -> Limits:
    """The limits for a compute dtype; `full`: a model of a released size, which sums more numbers."""
    if dtype == "float32":
        logits = 1e-4 if full else 2e-5
        return Limits(logits=logits, gradient=1e-4, apart=1e-3, ratio=1.2, exact=1.2e-7, loss=4.8e-7, greedy=True)
    return Limits(logits=np.inf, gradient=np.inf, apart=0.3, ratio=1.2, exact=1.2e-7, loss=2.0**-9, greedy=False)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        case: the name of the case.
        rows: every comparison.
        failures: what was beyond the limits, a line each; none if the sides agree.
    """

    case: str
    rows: tuple[Row, ...]
    failures: tuple[str, ...]

    @property
    def groups(self) -> list[Row]:
        """One row for each kind of evidence."""
        summaries = [summarize(self.rows, group) for group in GROUPS]
        return [row for row in summaries if row is not None]


def check(
    case: Case,
    directory: Path | None = None,
    *,
    dtype: str = "float32",
    new_tokens: int = 16,
    precision: str = "highest",
    gradients: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs a whole model in both frameworks, and in float64.

    Args:
        case: the architecture and the shape of the batch.
        directory: a checkpoint of that architecture; by default random weights are written to one and read back by
            both sides.
        dtype: compute dtype of both sides, "float32" or "bfloat16".
        new_tokens: length of the greedy continuation.
        precision: of our float32 matrix products, as for `jax.default_matmul_precision`; see `ops.linear`.
        gradients: whether to compare them; they take most of the time and memory.
        seed: of weights and tokens.
        progress: is told what is being done.

    Raises:
        ValueError: transformers has no such family, cannot run the architecture, or did not take the checkpoint whole.
    """
    reference.reference_config(case.config, reference.CHUNK_SIZE)
    states = reference_family(case.config).states
    batch = case.tokens(seed)
    with tempfile.TemporaryDirectory(prefix="zamba2-parity-") as name:
        scratch = Path(name)
        if directory is None:
            progress("making random weights")
            directory = scratch / "checkpoint"
            save_hf(ours.random_model(case.config, seed), directory, dtype=dtype)
        theirs, our = Evidence(scratch / "torch"), Evidence(scratch / "ours")

        progress("PyTorch: outputs")
        model = reference.load(directory, case.config, dtype, reference.CHUNK_SIZE)
        theirs.add(reference.forward(model, case.config, batch))
        progress("PyTorch: greedy continuation")
        their_tokens = reference.greedy(model, batch, new_tokens)
        progress("PyTorch: gradients")
        for items in reference.gradients(model, case.config, batch, backward=gradients):
            theirs.add(items)
        del model
        gc.collect()

        jax_model = load_hf(directory, dtype=dtype)
        with jax.default_matmul_precision(precision):
            progress("JAX: outputs")
            our.add(ours.forward(jax_model, states, batch))
            progress("JAX: greedy continuation")
            our_tokens = ours.greedy(jax_model, batch, new_tokens)
            progress("JAX: gradients")
            for items in ours.gradients(jax_model, batch, backward=gradients):
                our.add(items)
        jax.clear_caches()
        gc.collect()

        parts = parts_of(jax_model)
        oracle = evidence(case.config, *parts, batch, states, ORACLE, gradients=gradients, sum_calls=True)
        rows: list[Row] = []
        for items in with_settings(oracle, ORACLE):
            progress(f"float64 oracle: {next(iter(items))}")
            rows += compare_items(our, theirs, items)
    unseen = (set(our.names) | set(theirs.names)) - {row.name for row in rows}
    if unseen:
        raise ValueError(f"{case.name}: the oracle has no {sorted(unseen)}")
    rows.append(compare_tokens(our_tokens, their_tokens))
    full = case.config.hidden_size >= 1024
    return report(case.name, rows, limits_for(dtype, full=full))


def compare_items(our: Evidence | Items, theirs: Evidence | Items, oracle: Items) -> Iterable[Row]:
    """Compares every array of the oracle with both sides'."""
    for name, array in oracle.items():
        yield compare(name, _group(name), our[name], theirs[name], array)


def compare_tokens(our: np.ndarray, their: np.ndarray) -> Row:
    """Greedy tokens as evidence: the share that differs."""
    differ = float(np.mean(our != their))
    return Row("greedy", "greedy", differ, differ, 0.0, 0.0, 1.0)


def report(case: str, rows: Iterable[Row], limits: Limits) -> Report:
    """The rows, and which of them, or which kind of them as a whole, is beyond the limits."""
    rows = tuple(sorted(rows, key=lambda row: GROUPS.index(row.group)))
    by_group = {"logits": limits.logits, "gradient": limits.gradient, "greedy": 0.0 if limits.greedy else 1.0}
    failures = []
    for row in rows:
        limit = by_group.get(row.group, np.inf)
        if not row.relative <= limit:
            failures.append(f"{row.name}: relative error {row.relative:.1e}, at most {limit:.0e} allowed")
        elif row.group != "greedy" and not max(row.relative, row.our_error) <= limits.apart:
            failures.append(
                f"{row.name}: relative error {row.relative:.1e} against PyTorch, {row.our_error:.1e} against float64, "
                f"at most {limits.apart:.0e} allowed"
            )
    for group in GROUPS:
        whole = summarize(rows, group)
        exact = limits.loss if group == "loss" else limits.exact
        if whole is not None and not whole.our_error <= max(limits.ratio * whole.torch_error, exact):
            failures.append(
                f"{group}: error against float64 {whole.our_error:.2e}, "
                f"more than {limits.ratio} times PyTorch's {whole.torch_error:.2e}"
            )
    return Report(case, rows, tuple(failures))


def _group(name: str) -> str:
    if name.startswith("gradient."):
        return "gradient"
    kind = name.rsplit(".", 1)[-1]
    return "layer" if kind == "output" else kind
