"""The command as a user would type it, without what is only this machine's."""

from pathlib import Path

import pytest

from atom.circumstances import _driver_version, command_line


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


def test_the_driver_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _driver_version() is None
    tool = tmp_path / "nvidia-smi"
    for script, said in (("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", None), ("", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert _driver_version() == said
