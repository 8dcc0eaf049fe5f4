import json
import math

from zamba2_jax.train.metrics import EvalRecord, JsonLines, TrainRecord, bits_per_byte, tee


def train_record(**kwargs):
    values = {"phase": "p", "step": 3, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 30}
    return TrainRecord(**{**values, "seconds": 1.5, "skipped": 0, **kwargs})


def test_lines_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as write:
        write(train_record())
        write(train_record(loss=math.nan, grad_norm=math.inf))
        write(EvalRecord(phase="p", step=3, held_out="prose", loss=2.0))
        lines = path.read_text().splitlines()  # there before the file is closed
    values = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]
    assert values[0] == {"kind": "train", **vars(train_record())}
    assert (values[1]["loss"], values[1]["grad_norm"]) == (None, None)
    assert values[2] == {"kind": "eval", "phase": "p", "step": 3, "held_out": "prose", "loss": 2.0}


def test_units():
    assert train_record().tokens_per_second == 20
    assert bits_per_byte(math.log(256), tokens=5, size=5) == 8


def test_tee():
    first, second = [], []
    tee(first.append, second.append)(train_record())
    assert first == second == [train_record()]
