"""Which parts a model needs: what the loss on a text rises by when one of them is silenced.

A silenced part says nothing about the token it stands at, but keeps what is the same for every token: a call's
attention is made uniform over what it may see, an output is replaced by its mean over the tokens. So a part that gives
the same to every token, however large, turns out to be worth nothing.

All parts take one compiled program, in which an array of switches says what is silenced.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from rich.table import Table

from zamba2_jax.data.batches import Batch
from zamba2_jax.files import finite, write_atomically
from zamba2_jax.inference.sampling import log_probability
from zamba2_jax.interpret.taps import tap_names
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.registry import init_model
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.parameter import named_parameters, with_values
from zamba2_jax.nn.tap import Tap
from zamba2_jax.ops.cross_entropy import map_positions
from zamba2_jax.train.objectives import target_weights
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

Kind = Literal["attention", "adapters", "mlp", "shared", "mixer", "layer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HOW: dict[Kind, str] = {
    "attention": "attention uniform",
    "adapters": "adapters at 0",
    "mlp": "MLP at its mean",
    "shared": "shared output at its mean",
    "mixer": "mixer at its mean",
    "layer": "layer skipped",
}
"""How each kind of part is silenced."""

POSITIONS = 64
"""Positions of every row whose logits exist at a time."""


class Part(NamedTuple):
    """What is silenced together.

    Attributes:
        place: "layers.3" for one layer; "all", or of those that call a shared block "hybrid", of the others "plain".
        kind: of what is silenced there.
        layers: that are concerned.
    """

    place: str
    kind: Kind
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """As "layers.3.mixer" or "all.attention"."""
        return f"{self.place}.{self.kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silenced:
    """What a model loses with a part.

    Attributes:
        part: what was silenced.
        loss: mean over the predicted tokens by their weights with the part silenced, in nats.
        increase: that over the loss of the whole model.
        error: standard error of the increase, from how it differs between the rows; NaN for a single row.
        accuracy: by their weights, share of those tokens that the model finds likeliest, with the part silenced.
    """

    part: Part
    loss: float
    increase: float
    error: float
    accuracy: float

    @property
    def is_significant(self) -> bool:
        """Whether the increase, up or down, is more than two standard errors."""
        return abs(self.increase) > 2 * self.error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Necessity:
    """What a model loses with each of its parts, on some text.

    Attributes:
        loss: of the whole model, mean over the predicted tokens by their weights, in nats.
        accuracy: by their weights, share of the predicted tokens that it finds likeliest.
        tokens: that were predicted; those whose weight is 0 are not counted.
        rows: that held any.
        silenced: what was silenced, with what came of it.
    """

    loss: float
    accuracy: float
    tokens: int
    rows: int
    silenced: tuple[Silenced, ...]

    def __getitem__(self, name: str) -> Silenced:
        """By the name of the part, as "layers.3.mixer" or "all.attention"."""
        for silenced in self.silenced:
            if silenced.part.name == name:
                return silenced
        raise KeyError(f"{name}: expected one of {', '.join(silenced.part.name for silenced in self.silenced)}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON: parts by name, numbers that are not finite as None."""
        fields = ("loss", "increase", "error", "accuracy")
        parts = {of.part.name: {name: getattr(of, name) for name in fields} for of in self.silenced}
        whole = {name: getattr(self, name) for name in ("loss", "accuracy", "tokens", "rows")}
        return finite({**whole, "silenced": parts})

    def table(self, quantity: Literal["loss", "accuracy"] = "loss") -> Table:
        """For the terminal, a row per place and a column per kind.

        Args:
            quantity: "loss" shows what it rises by, with the standard error, dim where that is within two of them;
                "accuracy" what is left of it.
        """
        whole = f"loss {self.loss:.3f} nats per token" if quantity == "loss" else f"accuracy {self.accuracy:.3f}"
        shown = "what it rises by" if quantity == "loss" else "what is left of it"
        table = Table(
            title=f"{whole} on {self.tokens:,} tokens in {self.rows:,} rows; {shown} with", title_justify="left"
        )
        kinds, cells = self._grid()
        table.add_column("")
        for kind in kinds:
            table.add_column(HOW[kind], justify="right")

        def cell(of: Silenced | None) -> str:
            if of is None:
                return ""
            if quantity == "accuracy":
                return f"{of.accuracy:.3f}"
            error = f" ±{of.error:.4f}" if math.isfinite(of.error) else ""
            text = f"{of.increase:+.4f}{error}"
            return text if of.is_significant or not error else f"[dim]{text}[/]"

        for place, row in cells.items():
            table.add_row(place, *(cell(row.get(kind)) for kind in kinds))
        return table

    def plot(self, path: Path) -> None:
        """Draws what the loss rises by: a PNG, places across and kinds down, darker for more."""
        kinds, cells = self._grid()
        values = np.full((len(kinds), len(cells)), np.nan)
        for column, row in enumerate(cells.values()):
            for kind, of in row.items():
                values[kinds.index(kind), column] = of.increase
        few = len(cells) <= 20
        size = (3 + len(cells) * (0.75 if few else 0.25), 1.5 + 0.45 * len(kinds))
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        axes = figure.subplots()
        top = max(1.0, float(np.nanmax(values)))
        # As the naked eye reads it: linear up to 0.01 nats, by powers of ten from there on.
        norm = SymLogNorm(linthresh=0.01, vmin=0, vmax=top, base=10)
        picture = axes.imshow(values, cmap="YlOrRd", norm=norm, aspect="auto")
        axes.set_yticks(range(len(kinds)), [HOW[kind] for kind in kinds])
        axes.set_xticks(
            range(len(cells)), [place.removeprefix("layers.") for place in cells], rotation=0 if few else 90
        )
        axes.set_xlabel("layer, or group of layers")
        axes.set_title(f"What the loss of {self.loss:.3f} nats per token rises by", loc="left")
        if few:
            for (y, x), value in np.ndenumerate(values):
                if np.isfinite(value):
                    color = "white" if norm(value) > 0.7 else "black"
                    axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(picture, label="nats per token")
        write_atomically(path, lambda temporary: figure.savefig(temporary))

    def _grid(self) -> tuple[list[Kind], dict[str, dict[Kind, Silenced]]]:
        """The kinds that there are, and by place and kind what was silenced."""
        cells: dict[str, dict[Kind, Silenced]] = {}
        for of in self.silenced:
            cells.setdefault(of.part.place, {})[of.part.kind] = of
        present = {of.part.kind for of in self.silenced}
        return [kind for kind in KINDS if kind in present], cells


@functools.cache
def parts(config: ModelConfig) -> tuple[Part, ...]:
    """All parts of such a model that can be silenced: each by itself, and then those of a kind together.

    Besides those of all layers together there are those of the hybrid and of the plain layers, where a layer is hybrid.
    """
    layers, hybrid = tuple(range(config.num_layers)), config.hybrid_layers
    plain = tuple(layer for layer in layers if layer not in hybrid)
    kinds = _kinds_by_layer(jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0))))
    single = [Part(f"layers.{layer}", kind, (layer,)) for layer in layers for kind in KINDS if kind in kinds[layer]]

    def together(place: str, layers: Sequence[int], wanted: Sequence[Kind]) -> list[Part]:
        return [Part(place, kind, tuple(layer for layer in layers if kind in kinds[layer])) for kind in wanted]

    groups = together("all", layers, [kind for kind in KINDS if kind != "layer"])
    if hybrid:
        groups += [*together("hybrid", hybrid, ("mixer", "layer")), *together("plain", plain, ("mixer", "layer"))]
    return (*single, *(part for part in groups if part.layers))


def _kinds_by_layer(model: LanguageModel) -> list[set[Kind]]:
    """What can be silenced in each layer, by the taps and the adapters that it has."""
    config = model.config
    kinds: list[set[Kind]] = [{"layer"} for _ in range(config.num_layers)]
    for name in tap_names(model):
        _, layer, place = [*name.split(".", 2), "", ""][:3]
        kind = _kind_at(place, model.mixer_outputs)
        if kind is not None:
            kinds[int(layer)].add(kind)
    for name, parameter in named_parameters(model).items():
        if _is_adapter(name) and parameter.size:
            kinds[config.hybrid_layers[int(name.split(".")[1])]].add("adapters")
    return kinds


def _kind_at(place: str, mixer_outputs: Sequence[str]) -> Kind | None:
    """What is silenced at a tap of a layer, such as "shared.mlp.output"; see `LanguageModel`."""
    if place in mixer_outputs:
        return "mixer"
    in_block = place.removeprefix("shared.")
    kinds: dict[str, Kind] = {"attention.q": "attention", "mlp.output": "mlp"}
    return "shared" if place == "shared.output" else kinds.get(in_block)


def _is_adapter(name: str) -> bool:
    """Whether a parameter is the second matrix of an adapter."""
    return name.startswith("calls.") and name.endswith("_b")


def necessity(model: LanguageModel, batches: Iterable[Batch], *, select: Iterable[str] = ("*",)) -> Necessity:
    """What the loss on the batches rises by when a part of the model is silenced.

    Where a layer, or the shared block that it calls, has them: attention made uniform over the tokens it may see; the
    output of an MLP at the mean over the tokens. For each call of a shared block: its adapters, those of attention and
    MLP, at 0; its whole output at the mean. For each layer: the output of its mixer, which in a transformer is
    attention, at the mean; and all that it adds to the stream, but not what it calls, at 0, which skips the layer.
    The same for all layers together, and of mixers for the hybrid and the plain ones. A mean is that over the tokens
    of a batch, padding left out, as they are with the other parts as they are silenced.

    Args:
        model: the model.
        batches: rows of held-out text, all of one shape.
        select: shell-style patterns of the names of parts to silence, as "*.mixer" or "all.*"; see `parts`.

    Raises:
        ValueError: a pattern matches no part, or the batches hold no token to predict.
    """
    select = tuple(select)
    every = parts(model.config)
    chosen = [part for part in every if any(fnmatchcase(part.name, pattern) for pattern in select)]
    unmatched = [pattern for pattern in select if not any(fnmatchcase(part.name, pattern) for part in every)]
    if unmatched:
        raise ValueError(f"no part matches {unmatched}: expected names as {', '.join(part.name for part in every)}")
    switches = np.zeros((1 + len(chosen), len(KINDS), model.config.num_layers), bool)
    for row, part in enumerate(chosen, 1):
        switches[row, KINDS.index(part.kind), list(part.layers)] = True

    found = [[_silenced_pass(model, batch, which) for which in switches] for batch in batches]
    by_batch = [jax.tree.map(lambda *leaves: np.stack(leaves), *passes) for passes in jax.device_get(found)]
    if not by_batch or not sum(float(sums.weight[0].sum()) for sums in by_batch):
        raise ValueError("the held-out batches hold no token to predict")
    sums = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1).astype(np.float64), *by_batch)
    kept = sums.weight[0] > 0
    sums = jax.tree.map(lambda array: array[:, kept], sums)
    weight = sums.weight[0]
    losses, accuracies = (array.sum(axis=1) / weight.sum() for array in (sums.nll, sums.right))

    def result(row: int, part: Part) -> Silenced:
        rise = sums.nll[row] - sums.nll[0]
        increase = rise.sum() / weight.sum()
        return Silenced(
            part=part,
            loss=float(losses[row]),
            increase=float(increase),
            error=_standard_error(rise, weight),
            accuracy=float(accuracies[row]),
        )

    return Necessity(
        loss=float(losses[0]),
        accuracy=float(accuracies[0]),
        tokens=int(sums.tokens[0].sum()),
        rows=len(weight),
        silenced=tuple(result(row, part) for row, part in enumerate(chosen, 1)),
    )


def _standard_error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Of sum(sums) / sum(weights) over independent rows (the ratio estimator); NaN for a single row."""
    rows = len(sums)
    if rows < 2:
        return math.nan
    residuals = sums - sums.sum() / weights.sum() * weights
    return float(np.sqrt(rows / (rows - 1) * np.sum(residuals**2)) / weights.sum())


class _Sums(NamedTuple):
    """Of each row, over its predicted tokens: weight, weighted loss and right answers, and how many have a weight."""

    weight: Float[Array, " b"]
    nll: Float[Array, " b"]
    right: Float[Array, " b"]
    tokens: Int[Array, " b"]


@jax.jit
def _silenced_pass(model: LanguageModel, batch: Batch, switches: Bool[Array, "kinds layers"]) -> _Sums:
    """A pass with what the switches say silenced; without any it is the model's own."""
    tokens, segment_ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    of_token = None if batch.weights is None else jnp.asarray(batch.weights)
    model = _without_adapters(model, switches[KINDS.index("adapters")])
    h = model.run(tokens, segment_ids, tap=Tap(_Silencer(switches, segment_ids != 0, model.mixer_outputs))).h

    def of_positions(h: Array, targets: Array) -> tuple[Array, Array]:
        logits = model.logits(h, dtype=at_least_fp32(h.dtype))
        return -log_probability(logits, targets), jnp.argmax(logits, axis=-1) == targets

    nll, right = map_positions(of_positions, h, jnp.roll(tokens, -1, axis=1), POSITIONS)
    weights = target_weights(tokens, segment_ids, of_token, nll.dtype).astype(nll.dtype)
    return _Sums(
        weight=weights.sum(axis=1),
        nll=(weights * nll).sum(axis=1),
        right=(weights * right).sum(axis=1),
        tokens=(weights != 0).sum(axis=1, dtype=jnp.int32),
    )


class _Silencer:
    """The edit that silences what the switches say."""

    def __init__(self, switches: Bool[Array, "kinds layers"], real: Bool[Array, "b t"], mixer_outputs: Sequence[str]):
        self._switches, self._real, self._mixer_outputs = switches, real, mixer_outputs

    def __call__(self, name: str, value: Array) -> Array:
        """The value, or what takes its place."""
        _, layer, place = [*name.split(".", 2), "", ""][:3]
        kind = _kind_at(place, self._mixer_outputs)
        if kind is None:
            return value
        silent = jnp.zeros_like(value) if kind == "attention" else self._mean(value)  # queries of 0: equal scores
        value = jnp.where(self._is_on(kind, layer), silent, value)
        adds = kind == "mixer" or place == "mlp.output"
        return jnp.where(self._is_on("layer", layer), jnp.zeros_like(value), value) if adds else value

    def _is_on(self, kind: Kind, layer: str) -> Bool[Array, ""]:
        return self._switches[KINDS.index(kind), int(layer)]

    def _mean(self, value: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Over the tokens, in at least float32."""
        real = self._real[..., None]
        mean = jnp.sum(value, axis=(0, 1), where=real, dtype=at_least_fp32(value.dtype)) / jnp.maximum(real.sum(), 1)
        return jnp.broadcast_to(mean.astype(value.dtype), value.shape)


def _without_adapters(model: LanguageModel, switches: Bool[Array, " layers"]) -> LanguageModel:
    """The model with the second matrix of every adapter at 0 where the switch of the call's layer says so."""
    layers = model.config.hybrid_layers

    def of(name: str, array: Array) -> Array:
        if not _is_adapter(name):
            return array
        return jnp.where(switches[layers[int(name.split(".")[1])]], 0, array)

    return with_values(model, {name: of(name, parameter[...]) for name, parameter in named_parameters(model).items()})
