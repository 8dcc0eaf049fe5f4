"""The ops that have kernels, and the scans of all families, as cases: small ones, and at a model's sizes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.check.compare import Case, Implementation, Subject
from zamba2_jax.nn.config import AttentionConfig, HybridConfig, Mamba1Config, Mamba2Config, ModelConfig
from zamba2_jax.ops.attention import cached_attention, causal_attention, document_tags, stored_dtype
from zamba2_jax.ops.attention_splash import attention_splash
from zamba2_jax.ops.backend import has_triton
from zamba2_jax.ops.conv import causal_conv1d_step
from zamba2_jax.ops.decay import log_decays
from zamba2_jax.ops.linear import linear
from zamba2_jax.ops.selective_scan import selective_scan
from zamba2_jax.ops.ssd import ssd, ssd_step
from zamba2_jax.ops.ssd_pallas_tpu import ssd_pallas_tpu
from zamba2_jax.typing import Array, Float, Int

Platform = Literal["cpu", "gpu", "tpu"]
Inputs = Mapping[str, Any]
Results = dict[str, Array]
TOKENS = 2048
"""Tokens of the row at a model's sizes."""
PIECE = 64
"""Tokens of a row that an oracle keeps the states of at a time."""


class ScanSizes(NamedTuple):
    """Rows, tokens, heads, channels of a head, groups and states of a scan."""

    b: int
    t: int
    h: int
    p: int
    g: int
    n: int


class AttentionSizes(NamedTuple):
    """Rows, tokens, query heads, key heads, channels of a head, and the window, if there is one."""

    b: int
    t: int
    h: int
    kv: int
    p: int
    window: int | None = None


class StepSizes(NamedTuple):
    """Rows, width, heads, channels of a head, groups and states of a step, and taps of its convolutions."""

    b: int
    d: int
    h: int
    p: int
    g: int
    n: int
    taps: int = 4


def small_cases(platform: Platform) -> dict[str, Callable[[], Case]]:
    """Of all ops, with documents, by name; sizes all differ, and end within a chunk of tokens or a block.

    On a CPU in float32 alone, but for what there is in bfloat16 only: interpreted, kernels compute either the same way.
    """
    # docs/xla-notes.md: narrow-heads-on-tpu
    scan = ScanSizes(2, 140, 4, 8, 2, 10) if platform == "cpu" else ScanSizes(2, 140, 4, 64, 2, 16)
    selective, step = ScanSizes(2, 37, 3, 8, 3, 10), StepSizes(3, 128, 8, 32, 2, 16)
    attention = AttentionSizes(2, 140, 6, 3, 16)
    found: dict[str, Callable[[], Case]] = {}
    for dtype in ("float32",) if platform == "cpu" else ("float32", "bfloat16"):
        found |= {
            f"scan in {dtype}": partial(scan_case, scan, dtype, platform, _documents(scan.b, scan.t)),
            f"attention in {dtype}": partial(
                attention_case, attention, dtype, platform, _documents(attention.b, attention.t)
            ),
            f"cached attention in {dtype}": partial(cached_attention_case, attention, dtype, platform),
            f"selective scan in {dtype}": partial(selective_scan_case, selective, dtype),
        }
    return found | {"step": partial(step_case, step, platform)}


def model_cases(config: ModelConfig, platform: Platform) -> dict[str, Callable[[], Case]]:
    """Those that a model calls, at its sizes, in bfloat16: one row of `TOKENS`, a step of one row."""
    found: dict[str, Callable[[], Case]] = {}
    real: Mapping[str, Any] = {"dtype": "bfloat16", "real": True}
    if isinstance(config, Mamba2Config):
        heads = config.mamba_heads, config.mamba_head_dim, config.ngroups, config.d_state
        found["scan"] = partial(scan_case, ScanSizes(1, TOKENS, *heads), platform=platform, **real)
        step = StepSizes(1, config.hidden_size, *heads, config.d_conv)
        found["step"] = partial(step_case, step, platform, real=True)
    if isinstance(config, Mamba1Config):
        h, p = config.mamba_heads, config.mamba_head_dim
        found["selective scan"] = partial(selective_scan_case, ScanSizes(1, TOKENS, h, p, h, config.d_state), **real)
    if isinstance(config, AttentionConfig | HybridConfig):
        window = config.sliding_window if isinstance(config, AttentionConfig) else None
        h, kv, p = config.attention_heads, config.kv_heads, config.attention_head_dim
        attention = AttentionSizes(1, TOKENS, h, kv, p, window)
        found["attention"] = partial(attention_case, attention, platform=platform, **real)
        found["cached attention"] = partial(cached_attention_case, attention, platform=platform, **real)
    return found


def scan_case(
    sizes: ScanSizes, dtype: str, platform: Platform, ids: Int[Array, "b t"] | None = None, *, real: bool = False
) -> Case:
    """`ops.ssd` against its recurrence."""
    b, t, h, p, g, n = sizes
    draw = _Draw(dtype)
    inputs = {
        "x": draw(b, t, h, p),
        "dt": draw.steps(b, t, h),
        "A": -draw.rates(h),
        "B": draw(b, t, g, n),
        "C": draw(b, t, g, n),
        "D": draw(h, dtype="float32"),
        "initial_state": draw(b, h, p, n, dtype="float32"),
    }

    def plain(inputs: Inputs) -> Results:
        return _named(ssd(**inputs, segment_ids=ids, implementation="xla"))

    def by_kernels(kernel: Callable[..., Any], interpret: bool, inputs: Inputs) -> Results:
        of = dict(inputs)
        decays = log_decays(of["dt"], of.pop("A"), ids)
        return _named(kernel(**of, log_decay=decays, interpret=interpret))

    kernels = {"pallas_tpu": ssd_pallas_tpu}
    if has_triton():
        from zamba2_jax.ops.ssd_pallas_gpu import ssd_pallas_gpu

        kernels["pallas_gpu"] = ssd_pallas_gpu
    subject = Subject("scan", _shape(sizes), dtype, "scan", real)
    found = {name: partial(by_kernels, kernel) for name, kernel in kernels.items()}
    oracle = _in_pieces(ssd) if ids is None else partial(_oracle, ssd, ids)
    return Case(subject, inputs, oracle, _implementations(plain, found, platform, real))


def selective_scan_case(sizes: ScanSizes, dtype: str, *, real: bool = False) -> Case:
    """`ops.selective_scan` against its recurrence; every head is a group."""
    b, t, h, p, _, n = sizes
    draw, ids = _Draw(dtype), None if real else _documents(b, t)
    inputs = {
        "x": draw(b, t, h, p),
        "dt": draw.steps(b, t, h, p),
        "A": -draw.rates(h, p, n),
        "B": draw(b, t, h, n),
        "C": draw(b, t, h, n),
        "D": draw(h, p, dtype="float32"),
        "initial_state": draw(b, h, p, n, dtype="float32"),
    }

    def plain(inputs: Inputs) -> Results:
        return _named(selective_scan(**inputs, segment_ids=ids))

    oracle = _in_pieces(selective_scan) if ids is None else partial(_oracle, selective_scan, ids)
    subject = Subject("selective scan", _shape(sizes), dtype, real=real)
    return Case(subject, inputs, oracle, {"xla": Implementation(plain)})


def attention_case(
    sizes: AttentionSizes,
    dtype: str,
    platform: Platform,
    ids: Int[Array, "b t"] | None = None,
    *,
    real: bool = False,
) -> Case:
    """`ops.causal_attention` against its definition."""
    inputs, scale = _attention_inputs(sizes, dtype), sizes.p**-0.5
    window, tags = sizes.window, None if ids is None else document_tags(ids)

    def attend(implementation: Any, inputs: Inputs) -> Results:
        return {
            "y": causal_attention(**inputs, scale=scale, segment_ids=ids, window=window, implementation=implementation)
        }

    def splash(interpret: bool, inputs: Inputs) -> Results:
        return {"y": attention_splash(**inputs, tags=tags, scale=scale, window=window, interpret=interpret)}

    found = _implementations(partial(attend, "xla"), {"splash": splash}, platform, real)
    if platform == "gpu" and dtype == "bfloat16" and window is None:
        found["cudnn"] = Implementation(partial(attend, "cudnn"))
    return Case(Subject("attention", _shape(sizes), dtype, "attention", real), inputs, partial(attend, "plain"), found)


def cached_attention_case(sizes: AttentionSizes, dtype: str, platform: Platform, *, real: bool = False) -> Case:
    """`ops.cached_attention` of the second half of the rows to all of them, against attention without a cache."""
    inputs, scale, before = _attention_inputs(sizes, dtype), sizes.p**-0.5, sizes.t // 2
    slots = jnp.broadcast_to(jnp.arange(before, sizes.t), (sizes.b, sizes.t - before))

    def attend(implementation: Any, inputs: Inputs) -> Results:
        q, k, v = (inputs[name] for name in "qkv")
        stored = stored_dtype(q.dtype)

        def cache(array: Array) -> Array:
            held = jnp.zeros((sizes.b, sizes.kv, sizes.t, sizes.p), array.dtype)
            held = held.at[:, :, :before].set(array[:, :before].swapaxes(1, 2))
            return held if stored == held.dtype else jax.lax.bitcast_convert_type(held, stored)

        held = cache(k), cache(v), slots, jnp.ones(slots.shape, bool), scale
        new_q, new_k, new_v = (array[:, before:] for array in (q, k, v))
        return {"y": cached_attention(new_q, new_k, new_v, *held, implementation)[0]}

    def oracle(inputs: Inputs) -> Results:
        return {"y": causal_attention(**inputs, scale=scale, implementation="plain")[:, before:]}

    found = {"xla": Implementation(partial(attend, "xla"))}
    if platform == "gpu" and dtype == "bfloat16":
        found["cudnn"] = Implementation(partial(attend, "cudnn"))
    subject = Subject("cached attention", _shape(sizes), dtype, "cached_attention", real)
    return Case(subject, inputs, oracle, found, gradients=False)


def step_case(sizes: StepSizes, platform: Platform, *, real: bool = False) -> Case:
    """A step of a Mamba2 block up to its gated norm, in bfloat16, against the ops it is made of."""
    b, d, h, p, g, n, taps = sizes
    e, bc, draw = h * p, 2 * g * n, _Draw("bfloat16")
    vector = partial(draw, dtype="float32")
    rows = {"in_z": e, "in_x": e, "in_bc": bc, "in_dt": h}
    inputs = {
        "u": draw(b, d),
        **{name: draw(size, d, scale=d**-0.5) for name, size in rows.items()},
        "conv_x": draw(taps, e, scale=0.5),
        "conv_x_bias": vector(e),
        "conv_bc": draw(taps, bc, scale=0.5),
        "conv_bc_bias": vector(bc),
        "dt_bias": vector(h) - 2,  # dt of about 0.1
        "A_log": jnp.log(draw.rates(h)),
        "D": vector(h),
        "past_x": draw(b, taps - 1, e),
        "past_bc": draw(b, taps - 1, bc),
        "ssm": vector(b, h, p, n),
    }

    def by_kernels(interpret: bool, inputs: Inputs) -> Results:
        from zamba2_jax.ops.mamba_step_pallas_gpu import StepWeights, mamba_step_pallas_gpu

        weights = StepWeights(*(inputs[name] for name in StepWeights._fields))
        states = inputs["past_x"], inputs["past_bc"], inputs["ssm"]
        results = mamba_step_pallas_gpu(inputs["u"], weights, *states, (0.0, float("inf")), interpret=interpret)
        return dict(zip(("y", "past_x", "past_bc", "ssm"), results, strict=True))

    kernels = {"pallas_gpu": by_kernels} if has_triton() else {}
    subject = Subject("step", _shape(sizes), "bfloat16", "step", real)
    found = _implementations(_step, kernels, platform, real)
    return Case(subject, inputs, _step, found, gradients=False)


def _step(inputs: Inputs) -> Results:
    """The same as the plain ops of a block compute it; in float64 the oracle."""
    of, (b, h, p, n) = inputs, inputs["ssm"].shape
    wide = of["ssm"].dtype
    z, x, bc = (linear(of["u"], of[name]) for name in ("in_z", "in_x", "in_bc"))
    dt = jax.nn.softplus(linear(of["u"], of["in_dt"], dtype=wide) + of["dt_bias"])
    x, past_x = causal_conv1d_step(x, of["conv_x"], of["conv_x_bias"], of["past_x"], activation="silu")
    bc, past_bc = causal_conv1d_step(bc, of["conv_bc"], of["conv_bc_bias"], of["past_bc"], activation="silu")
    B, C = bc.reshape(b, 2, -1, n).swapaxes(0, 1)
    y, ssm = ssd_step(x.reshape(b, h, p), dt, -jnp.exp(of["A_log"]), B, C, of["D"], state=of["ssm"])
    gated = y.reshape(z.shape).astype(wide) * jax.nn.silu(z.astype(wide))
    return {"y": gated.astype(z.dtype), "past_x": past_x, "past_bc": past_bc, "ssm": ssm}


def _implementations(
    plain: Callable[[Any], Results],
    kernels: Mapping[str, Callable[..., Results]],
    platform: Platform,
    real: bool,
) -> dict[str, Implementation]:
    """Plain XLA and the kernels, made as `kernel(interpret, inputs)`, of the devices that are here.

    On a CPU all of them are interpreted; at real sizes that would take too long.
    """
    found = {"xla": Implementation(plain)}
    for name, kernel in kernels.items():
        of_platform = "gpu" if name == "pallas_gpu" else "tpu"
        if platform == of_platform:
            found[name] = Implementation(partial(kernel, False))
        elif platform == "cpu" and not real:
            found[name] = Implementation(partial(kernel, True), interpreted=True)
    return found


def _oracle(scan: Callable[..., Any], ids: Int[Array, "b t"], inputs: Inputs) -> Results:
    return _named(scan(**inputs, segment_ids=ids, implementation="sequential"))


def _in_pieces(scan: Callable[..., Any]) -> Callable[[Inputs], Results]:
    """The recurrence of a scan, whose gradient keeps the states of one piece of the rows only."""

    def run(inputs: Inputs) -> Results:
        by_time, rest = ("x", "dt", "B", "C"), {name: inputs[name] for name in "AD"}

        def cut(array: Array) -> Array:
            return jnp.moveaxis(array.reshape(len(array), -1, PIECE, *array.shape[2:]), 1, 0)

        @jax.checkpoint
        def piece(state: Array, tokens: dict[str, Array]) -> tuple[Array, Array]:
            y, state = scan(**tokens, **rest, initial_state=state, implementation="sequential")
            return state, y

        pieces = {name: cut(inputs[name]) for name in by_time}
        state, y = jax.lax.scan(piece, inputs["initial_state"], pieces)
        return _named((jnp.moveaxis(y, 0, 1).reshape(inputs["x"].shape), state))

    return run


def _named(results: tuple[Array, Array]) -> Results:
    return dict(zip(("y", "state"), results, strict=True))


class _Draw:
    """Random arrays, the same every time; standard normal and in `dtype` unless told."""

    def __init__(self, dtype: str):
        self.dtype, self.rng = dtype, np.random.default_rng(0)

    def __call__(self, *shape: int, dtype: str | None = None, scale: float = 1.0) -> Float[Array, "*shape"]:
        return jnp.asarray(scale * self.rng.standard_normal(shape), dtype or self.dtype)

    def steps(self, *shape: int) -> Float[Array, "*shape"]:
        """Time steps from 0.001 to 0.1, log-uniform, as initialised."""
        return jnp.asarray(10 ** self.rng.uniform(-3, -1, shape), jnp.float32)

    def rates(self, *shape: int) -> Float[Array, "*shape"]:
        """Rates of decay from 1 to 16, as initialised."""
        return jnp.asarray(self.rng.uniform(1, 16, shape), jnp.float32)


def _attention_inputs(sizes: AttentionSizes, dtype: str) -> dict[str, Array]:
    b, t, h, kv, p, _ = sizes
    draw = _Draw(dtype)
    return {"q": draw(b, t, h, p), "k": draw(b, t, kv, p), "v": draw(b, t, kv, p)}


def _documents(b: int, t: int) -> Int[Array, "b t"]:
    """Segment ids of three documents or so in each row, which begin anywhere."""
    return jnp.asarray(np.sort(np.random.default_rng(2).integers(1, 4, (b, t))), jnp.int32)


def _shape(sizes: ScanSizes | AttentionSizes | StepSizes) -> str:
    """By the letters of `zamba2_jax.typing`."""
    return " ".join(f"{name}={size}" for name, size in sizes._asdict().items() if size is not None)
