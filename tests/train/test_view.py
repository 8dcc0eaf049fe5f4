"""The progress view and the picture: what people see of a run."""

import io
import struct

import pytest
from rich.console import Console

from zamba2_jax.train.curves import plot_run
from zamba2_jax.train.metrics import CallHealth, EvalRecord, GroupHealth, HealthRecord, TrainRecord
from zamba2_jax.train.progress import ProgressView
from zamba2_jax.train.schedule import Phase, learning_rate

PHASES = [
    Phase(name="pretraining", steps=40, shares={"code": 1.0}),
    Phase(name="annealing", steps=20, shares={"prose": 0.75, "code": 0.25}),
]


def records():
    for step in range(1, 61):
        phase = "pretraining" if step <= 40 else "annealing"
        yield TrainRecord(
            phase=phase,
            step=step,
            loss=7 - step / 20,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens=100,
            seconds=0.5,
            skipped=int(step > 50),
        )
        if step % 20 == 0:
            yield EvalRecord(phase=phase, step=step, held_out="prose", loss=7 - step / 30, accuracy=step / 100)


def show(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
    with ProgressView(PHASES, console) as view:
        for record in records():
            view(record)
    return console.file.getvalue()


def test_plain_lines_without_a_terminal():
    lines = show(terminal=False).splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "pretraining 5/40  loss 6.750  lr 1.0e-03  200 tok/s"
    assert "pretraining 40/40  held-out prose 5.667, accuracy 40.0%" in lines
    assert lines[-2:] == [
        "annealing 20/20  loss 4.000  lr 1.0e-03  200 tok/s  skipped 1",
        "annealing 20/20  held-out prose 5.000, accuracy 60.0%",
    ]
    assert len(lines) == 8 + 8 + 3


def test_health_is_on_the_line_and_faults_are_said_once():
    console = Console(file=io.StringIO(), width=300)
    with ProgressView(PHASES, console) as view:
        for record in records():
            if record.step % 5 == 0 and isinstance(record, TrainRecord):
                call = CallHealth(ratio=30.0, share=0.99, entropy=(0.5, 0.75))
                group = GroupHealth(grad_norm=1.0, update=0.01, step=0.3)
                view(
                    HealthRecord(phase=record.phase, step=record.step, calls={"layers.2": call}, groups={"head": group})
                )
            view(record)
    lines = console.file.getvalue().splitlines()
    assert lines[0].endswith(
        "200 tok/s  shared/residual 30 in layers.2, attention 0.50 uniform in layers.2, head move 0.3"
    )
    (warning,) = (line for line in lines if line.startswith("Warning"))
    assert "layers.2: the shared block drowns the residual stream" in warning
    assert "(step 15; see docs/health.md)" in warning


def test_bars_on_a_terminal():
    text = show(terminal=True)
    for part in ("pretraining", "annealing", "40/40", "20/20", "loss 4.000", "200 tok/s", "held-out prose 5.000"):
        assert part in text


@pytest.mark.parametrize("phases", [PHASES, PHASES[:1]])
def test_picture(phases, tmp_path):
    names = {phase.name for phase in phases}
    shown = [record for record in records() if record.phase in names]
    call = CallHealth(ratio=0.3, share=0.2, entropy=(0.5, 0.75))
    shown.append(HealthRecord(phase="annealing", step=60, calls={"layers.2": call}, groups={}))
    costs = {"prose": {"all.attention": 0.05, "all.mixer": 2.0}, "code": {"all.attention": -0.001, "all.mixer": 1.0}}
    plot_run(shown, phases, learning_rate(phases, 1e-3), tmp_path / "c.png", costs=costs)
    header = (tmp_path / "c.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1170, 1430)
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
