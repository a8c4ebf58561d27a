"""The command as a user would type it, without what is only this machine's."""

import pytest

from atom.circumstances import command_line


def test_command_line_hides_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "/opt/venv/bin/atom",
        "eval",
        "/data/models/small",
        "--ppl",
        "c4=/data/c4.txt",
        "org/model",
        "https://a/b/c",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert command_line() == "atom eval small --ppl c4=c4.txt org/model https://a/b/c"
