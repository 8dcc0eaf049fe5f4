import pytest
import tyro

from zamba2_jax.cli.main import main
from zamba2_jax.cli.several import Several, values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ()),
        (["--option", "1"], (1,)),
        (["--option", "1", "2", "--option", "3"], (1, 2, 3)),
        (["--option=1", "--option=2", "--option", "3", "4"], (1, 2, 3, 4)),
        (["--option"], ()),
    ],
)
def test_values_given_together_and_one_by_one_are_all_there_in_their_order(words, expected):
    def command(option: Several[int] = ()) -> tuple[int, ...]:
        return values(option)

    assert tyro.cli(command, args=words) == expected


def test_all_changes_to_a_config_are_read(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("")
    words = ["train", "--config", str(tmp_path / "run.toml"), "--set", "sed=1"]
    assert main([*words, "--set", f"directory={tmp_path}"]) == 2
    assert "sed is unknown: did you mean 'seed'?" in capsys.readouterr().err
