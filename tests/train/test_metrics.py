import json
import math

from tensorboardX.proto.event_pb2 import Event

from zamba2_jax.train.metrics import (
    CallHealth,
    EvalRecord,
    GroupHealth,
    HealthRecord,
    JsonLines,
    TensorBoard,
    TrainRecord,
    bits_per_byte,
    read_records,
    tee,
)


def train_record(**kwargs):
    values = {"phase": "p", "step": 3, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 30}
    return TrainRecord(**{**values, "seconds": 1.5, "skipped": 0, **kwargs})


def test_lines_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as write:
        write(train_record())
        write(train_record(loss=math.nan, grad_norm=math.inf))
        write(EvalRecord(phase="p", step=3, held_out="prose", loss=2.0, accuracy=0.25))
        lines = path.read_text().splitlines()  # there before the file is closed
    values = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]
    assert values[0] == {"kind": "train", **vars(train_record()), "perplexity": math.exp(2.5)}
    assert (values[1]["loss"], values[1]["grad_norm"], values[1]["perplexity"]) == (None, None, None)
    assert values[2] == {
        "kind": "eval",
        "phase": "p",
        "step": 3,
        "held_out": "prose",
        "loss": 2.0,
        "accuracy": 0.25,
        "bits_per_byte": None,
        "perplexity": math.exp(2.0),
    }


def health_record(**kwargs):
    calls = {"layers.1": CallHealth(ratio=0.5, share=0.25, entropy=(0.75, math.nan))}
    groups = {"mixers": GroupHealth(grad_norm=2.0, update=0.125, step=0.375)}
    return HealthRecord(**{"phase": "p", "step": 3, "calls": calls, "groups": groups, **kwargs})


def test_health_is_a_record_of_its_own(tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl") as write, TensorBoard(tmp_path / "board", first_step=3) as show:
        for record in (
            train_record(),
            health_record(),
            EvalRecord(phase="p", step=3, held_out="prose", loss=2.0, accuracy=0.25),
        ):
            write(record)
            show(record)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["health", "train", "eval"]
    assert records[0] == {
        "kind": "health",
        "phase": "p",
        "step": 3,
        "calls": {"layers.1": {"ratio": 0.5, "share": 0.25, "entropy": [0.75, None]}},
        "groups": {"mixers": {"grad_norm": 2.0, "update": 0.125, "step": 0.375}},
    }
    values = {value.tag: value.simple_value for event in events(tmp_path / "board") for value in event.summary.value}
    assert values["health/calls/layers.1/entropy/0"] == 0.75
    assert values["health/groups/mixers/step"] == 0.375


def test_a_run_that_goes_on_mends_the_last_line_and_its_records_win(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path, append=True) as write:
        for step in (1, 2, 3):
            write(train_record(step=step, loss=1.0))
        write(EvalRecord(phase="p", step=3, held_out="prose", loss=2.0, accuracy=0.25))
        write(EvalRecord(phase="p", step=3, held_out="code", loss=2.0, accuracy=0.25))
    path.write_bytes(path.read_bytes()[:-20])
    with JsonLines(path, append=True) as write:
        for step in (2, 3, 4):
            write(train_record(step=step, loss=0.5))
    found = [(record["kind"], record["step"], record["loss"]) for record in read_records(path)]
    trained = [("train", step, loss) for step, loss in ((1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5))]
    assert found == [*trained[:3], ("eval", 3, 2.0), trained[3]]


def test_tensorboard_has_the_numbers(tmp_path):
    with TensorBoard(tmp_path, first_step=3) as write:
        write(train_record(utilisation=0.25))
        write(EvalRecord(phase="p", step=4, held_out="prose", loss=2.0, accuracy=0.25))
    values = {
        value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value
    }
    assert values["train/loss"] == (3, 2.5)
    assert values["train/tokens_per_second"] == (3, 20)
    assert values["train/utilisation"] == (3, 0.25)
    assert values["eval/prose/loss"] == (4, 2)
    assert values["eval/prose/accuracy"] == (4, 0.25)
    assert not {"train/step", "train/memory", "train/phase"} & set(values)  # a step is no curve; others are not known


def events(directory):
    """What the one event file in a directory holds: records of a length in 8 bytes, 4 of a checksum, data, 4 more."""
    (file,) = directory.iterdir()
    data = file.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_units():
    assert train_record().tokens_per_second == 20
    assert bits_per_byte(math.log(256), tokens=5, size=5) == 8


def test_tee():
    first, second = [], []
    tee(first.append, second.append)(train_record())
    assert first == second == [train_record()]
