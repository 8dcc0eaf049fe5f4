"""Comparing implementations with an oracle in float64 on the host's CPU, and timing them."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.parallel.mesh import local_mesh
from zamba2_jax.typing import Array, Tree

Verdict = Literal["right", "slow", "wrong", "failed"]
Function = Callable[[Any], dict[str, Array]]
"""From arguments to results by name."""

FACTOR = 4
"""How much larger than plain XLA's error an implementation's may be: both round as often, but sum in other orders."""
FLOOR = {"float32": 5e-7, "bfloat16": 2**-6}
"""What is added to that: 8 roundings of float32; in bfloat16 four of both operands of a product, which XLA does not do
where, as on CPU, it multiplies in float32."""
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Errors of plain XLA itself: some hundred roundings of float32, 5 of both operands in bfloat16. Also for float32
where by default its products are taken in fewer bits, on TPUs (bfloat16) and GPUs (tf32)."""
SLOWER = 1.1
"""How many times XLA's time counts as slow, beyond what times differ by from run to run."""
ROUNDS, CALLS = 5, 5


class Implementation(NamedTuple):
    """A way to compute what a case is about.

    Attributes:
        function: results by name, of the arguments of the case.
        interpreted: whether it is a kernel for other devices, interpreted, the time of which means nothing.
    """

    function: Function
    interpreted: bool = False


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        name: of it, for people.
        shape: of its arguments, for people.
        dtype: float32 or bfloat16, in which it is computed.
        setting: field of `ops.backend.Backend` that chooses among its implementations; "" for all of them.
        real: whether its sizes are those of a released model, so that times count.
        limit: factor on `LIMITS`, for what is many ops deep.
    """

    name: str
    shape: str
    dtype: str
    setting: str = ""
    real: bool = False
    limit: float = 1.0


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    Attributes:
        subject: what it is.
        inputs: floating-point arrays by name, in the dtypes that the op takes.
        oracle: the definition, right in float64.
        implementations: by name, "xla" the first.
        gradients: whether to compare gradients too.
    """

    subject: Subject
    inputs: Mapping[str, Array]
    oracle: Function
    implementations: Mapping[str, Implementation]
    gradients: bool = True


@dataclass(frozen=True)
class Finding:
    """One implementation, measured.

    Attributes:
        subject: what was checked.
        implementation: of it.
        interpreted: whether it was interpreted.
        result: the result or gradient that is nearest to what is allowed, or furthest beyond; "" if none came.
        error: of that result, the norm of the difference to the oracle's over the norm of the oracle's.
        allowed: for that error.
        seconds: of a call, with gradients where these are compared; None where it was not timed.
        xla_seconds: of the same by plain XLA.
        verdict: "failed" if it did not run.
        message: why it did not run.
    """

    subject: Subject
    implementation: str
    interpreted: bool
    result: str
    error: float
    allowed: float
    seconds: float | None
    xla_seconds: float | None
    verdict: Verdict
    message: str = ""


Measured = dict[str, float] | str
"""Errors by result; or why there are none."""


def check_case(case: Case) -> list[Finding]:
    """All implementations of a case against its oracle and each other."""
    run = with_gradients if case.gradients else _without_gradients
    first = next(iter(case.implementations.values())).function
    weights = _weights(jax.eval_shape(first, case.inputs))
    exact = on_host(run(case.oracle), case.inputs, weights)
    measured: dict[str, Measured] = {}
    calls = {}
    for name, implementation in case.implementations.items():
        program = jax.jit(run(implementation.function))
        call = partial(program, case.inputs, weights)
        measured[name] = attempt(partial(_errors_of, call, exact))
        if not implementation.interpreted and isinstance(measured[name], dict):
            calls[name] = call
    interpreted = {name for name, implementation in case.implementations.items() if implementation.interpreted}
    return findings(case.subject, measured, seconds(calls), interpreted)


def findings(
    subject: Subject, measured: Mapping[str, Measured], times: Mapping[str, float], interpreted: Collection[str] = ()
) -> list[Finding]:
    """What is to be said of errors and times by implementation, "xla" among them."""
    limit = subject.limit * LIMITS[subject.dtype if jax.default_backend() == "cpu" else "bfloat16"]
    floor, plain = FLOOR[subject.dtype] * subject.limit, measured["xla"]

    def allowed(name: str, result: str) -> float:
        if name == "xla" or isinstance(plain, str):
            return limit
        return FACTOR * min(plain[result], limit) + floor

    found = []
    for name, of in measured.items():
        took, xla = times.get(name), times.get("xla")
        row = partial(Finding, subject, name, name in interpreted)
        if isinstance(of, str):
            found.append(row("", np.inf, limit, took, xla, "failed", of))
            continue
        worst = max(of, key=lambda result: of[result] / allowed(name, result))
        most = allowed(name, worst)
        slow = subject.real and took is not None and xla is not None and took > SLOWER * xla
        verdict: Verdict = "wrong" if of[worst] > most else "slow" if slow else "right"
        found.append(row(worst, of[worst], most, took, xla, verdict))
    return found


def attempt(measure: Callable[[], dict[str, float]]) -> Measured:
    """What is measured; or, whatever went wrong, that: a kernel that does not compile or run is a finding."""
    try:
        return measure()
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def with_gradients(function: Function) -> Callable[[Any, Any], dict[str, Array]]:
    """Also, as "d" + name, the gradient by every argument of the results' sum weighed by the second argument."""

    def run(inputs: Any, weights: Any) -> dict[str, Array]:
        results, pull = jax.vjp(function, inputs)
        [gradients] = pull(jax.tree.map(lambda weight, result: weight.astype(result.dtype), weights, results))
        return results | {f"d{name}": gradient for name, gradient in gradients.items()}

    return run


def _without_gradients(function: Function) -> Callable[[Any, Any], dict[str, Array]]:
    return lambda inputs, weights: function(inputs)


def _weights(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.standard_normal(of.shape), of.dtype) for name, of in shapes.items()}


def on_host(function: Callable[..., Tree], *arguments: Any) -> Tree:
    """The function, compiled, in float64 on the CPU of this host, whatever other devices there are; as numpy arrays."""
    numbers = [jax.tree.map(_as_float64, jax.device_get(argument)) for argument in arguments]
    with jax.enable_x64(True), jax.set_mesh(local_mesh("cpu")):
        return jax.device_get(jax.jit(function)(*numbers))


def _as_float64(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _errors_of(call: Callable[[], Mapping[str, Any]], exact: Mapping[str, Any]) -> dict[str, float]:
    return errors(call(), exact)


def errors(got: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, float]:
    """The norm of every difference over the norm of what is exact; infinite where it is not a number."""
    return {name: relative_error([got[name]], [exact[name]]) for name in exact}


def relative_error(got: list[Any], exact: list[Any]) -> float:
    """The same of arrays taken together."""
    squares, total = 0.0, 0.0
    for a, e in zip(jax.device_get(got), exact, strict=True):
        squares += float(np.sum((np.asarray(a, np.float64) - e) ** 2))
        total += float(np.sum(np.square(e, dtype=np.float64)))
    error = (squares / total) ** 0.5
    return error if np.isfinite(error) else np.inf


def seconds(calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of a call, the median of rounds in which calls, `CALLS` of each in a row, take turns.

    So a busy machine slows all of them. In a row, the host prepares a call while the device is at the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                results = call()
            jax.block_until_ready(results)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(of) for name, of in times.items()}
