"""The command as a user would type it, without what is only this machine's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atom.circumstances import CHECKOUT, _driver_version, command_line


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


@pytest.mark.parametrize("module", ["one", "one.two", "one.three"])
def test_a_module_is_named_as_it_was_run(module: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for file in ("__main__.py", "two.py", "three.py"):
        (tmp_path / "one" / file).write_text("from atom.circumstances import command_line\nprint(command_line())\n")
    (tmp_path / "one/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(tmp_path)])}

    def said(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    assert said("-m", module, "-o", "/a/b.json") == f"python -m {module} -o b.json"
    assert said("one/three.py", "x") == "python three.py x"


def test_the_driver_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _driver_version() is None
    tool = tmp_path / "nvidia-smi"
    for script, said in (("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", None), ("", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert _driver_version() == said
