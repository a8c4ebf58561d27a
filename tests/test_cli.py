"""The command: help, exit codes, one line of JSON, and the whole chain on a tiny model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.cli import COMMANDS, main
from atom.commands import quantize

Tiny = Callable[[str], Path]


@pytest.fixture
def atom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `atom ARGV...`; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


Atom = Callable[..., tuple[int, str, str]]


def last_json(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def test_overview_and_version(atom: Atom) -> None:
    code, out, _ = atom("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    assert atom()[0] == 2
    assert atom("--version")[1].startswith("atom ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_working_example(name: str, atom: Atom) -> None:
    code, out, _ = atom(name, "--help")
    assert code == 0 and "Example: atom " + name in out


def test_a_reader_who_has_read_enough_sees_no_traceback() -> None:
    command = [sys.executable, "-m", "atom", "check", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


def test_wrong_usage_is_2(atom: Atom) -> None:
    code, _, err = atom("serv")
    assert code == 2 and "unknown command 'serv'; use one of quantize" in err
    code, _, err = atom("quantize", "x", "--scheme", "w5a5")
    assert code == 2 and "unknown scheme 'w5a5'" in err.replace("\n", " ")
    code, _, err = atom("quantize", "x", "--scheme", "auto", "--gpu", "b200")
    assert code == 2 and err.startswith("atom quantize: nothing was measured that would recommend a scheme for b200")
    assert atom("quantize", "x", "--no-such-option")[0] == 2
    assert atom("check", "x", "--gpu", "tpu")[0] == 2
    code, _, err = atom("bench", "latency", "tiny", "--scheme", "w4a8")
    assert code == 2 and "Error parsing engine: scheme='w4a8' was given" in err
    assert "For full helptext, see atom bench latency --help" in err
    assert "Available subcommands: serve, throughput" in atom("bench", "load")[2]


def test_failure_is_1_and_says_what_to_do(atom: Atom, tmp_path: Path) -> None:
    code, _, err = atom("quantize", tmp_path / "none", "--output", tmp_path / "out")
    assert code == 1 and "is not there; give a directory, a GGUF file, a hub id" in err
    code, _, err = atom("eval", tmp_path, "--ppl", tmp_path / "no.txt")
    assert code == 1 and "no.txt does not exist" in err
    code, _, err = atom("report", "bench", tmp_path)
    assert code == 1 and err == f"atom report: {tmp_path}/throughput.json does not exist; check the path\n"
    code, _, err = atom("report", "accuracy", tmp_path / "none.json")
    assert code == 1 and f"there is no record {tmp_path}/none.json; check the path" in err


def test_the_whole_chain(atom: Atom, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """check, quantize, eval of both, report, chat: what the demo does, on a tiny random model."""
    source, out = tiny("llama"), tmp_path / "w4a4"
    code, printed, _ = atom("check", source, "--scheme", "w4a4", "--windows", 4, "--window-length", 64, "--json")
    checked = last_json(printed)
    assert code == 0 and checked["kv"] == "int4" and {row["runs"] for row in checked["ops"]} == {"reference"}

    options = ["--calib", text_file, "--windows", 8, "--window-length", 64, "--device", "cpu"]
    code, printed, _ = atom("quantize", source, "--scheme", "w4a4", *options, "-o", out, "--json")
    assert code == 0 and last_json(printed)["output"] == str(out)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert checked["disk_bytes"] == pytest.approx(written, rel=0.02, abs=20_000)

    results = []
    for name, model in (("fp", source), ("q", out)):
        results.append(tmp_path / f"{name}.json")
        code, printed, _ = atom(
            "eval", model, "--ppl", text_file, "--window", 64, "--limit", 4, "--output", results[-1], "--json"
        )
        assert code == 0 and "words" in printed
    code, printed, _ = atom("report", "eval", *results, "--json")
    (row,) = last_json(printed)["rows"]
    assert code == 0 and 30 < row["recovery"] < 150

    code, printed, _ = atom("report", "quant", out, "--plots", tmp_path / "plots", "--json")
    plots = last_json(printed)["plots"]
    assert code == 0 and plots and all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in plots)

    code, printed, _ = atom("chat", out, "--prompt", "ab", "--max-new-tokens", 5, "--json")
    (answer,) = last_json(printed)["answers"]
    assert code == 0 and answer["prompt_tokens"] > 0 and answer["tokens"] <= 5


def test_a_budget_chooses_formats_and_resumes(atom: Atom, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    options = ["--calib", text_file, "--windows", 6, "--window-length", 32, "--device", "cpu", "--budget-windows", 2]
    out = tmp_path / "mixed"
    code, printed, _ = atom("quantize", tiny("llama"), "--budget", 6.0, *options, "-o", out)
    assert code == 0 and "chosen" in printed and "w8a8" in printed
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["scheme"]
    assert len(scheme["overrides"]) > 3 and "formats by place" in printed
    code, printed, _ = atom("report", "quant", out, "--plots", tmp_path / "plots")
    assert code == 0 and "formats of weights and activations" in printed
    code, printed, _ = atom("check", out, "--json")
    layers = [row["where"] for row in last_json(printed)["ops"] if row["where"].startswith("down_proj")]
    assert code == 0 and sum(int(where.partition("(")[2].split()[0]) for where in layers) == 3 and len(layers) > 1
    (kept,) = tmp_path.glob("mixed.sensitivity-*.json")
    assert len(json.loads(kept.read_text())) == 15  # four inputs and a cache in each of three layers
    code, _, err = atom("quantize", tiny("llama"), "--budget", 1.0, *options, "-o", tmp_path / "none")
    assert code != 0 and "1 bits cannot be met" in err
    assert not list(tmp_path.glob("none*"))  # refused before anything was measured
    code, _, err = atom("quantize", tiny("llama"), "--budget", 5.0, *options, "-o", out)
    assert code == 1 and "exists and is not empty" in err
    code, _, err = atom("quantize", out, "--budget", 5.0, *options, "-o", tmp_path / "none")
    assert code == 1 and "mixed is quantized already" in err
    code, _, err = atom("quantize", tiny("llama"), "--max-loss", 0.0, *options)
    assert code == 2 and "--max-loss is a divergence in nats a token, above 0" in err.replace("\n", " ")
    code, _, err = atom("quantize", tiny("llama"), "--budget", 5.0, "--max-loss", 0.1, *options)
    assert code == 2 and "exclude each other" in err


def test_check_refuses_an_unknown_architecture_before_weights(atom: Atom, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    (tmp_path / "model.safetensors").write_bytes(b"not even a header")
    code, _, err = atom("check", tmp_path)
    assert code == 1 and "MambaForCausalLM is not supported; supported: LlamaForCausalLM" in err


def test_check_names_what_a_gpu_would_run(atom: Atom, tiny: Tiny) -> None:
    code, printed, _ = atom("check", tiny("llama"), "--scheme", "w4a16", "--gpu", "h200", "--json")
    rows = [row for row in last_json(printed)["ops"] if row["op"] == "linear"]
    assert code == 0 and rows
    code, printed, _ = atom("check", tiny("llama"), "--scheme", "auto", "--gpu", "h200", "--json")
    assert code == 0 and last_json(printed)["scheme"] == "w4a8-hadamard"
    assert all(row["runs"] or row["why"] for row in rows)
    assert all(set(row["bound_us"]) == {"1", "64", "2048"} for row in rows)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for cudaErrorMemoryAllocation", 2),
    ],
    ids=["gpu", "host", "python", "cuda"],
)
def test_out_of_memory_is_no_traceback(error: Exception, atom: Atom, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(quantize, "run", fail)
    code, _, err = atom("quantize", tmp_path)
    assert code == 1 and "out of memory (" in err and "take smaller batches" in err


def test_our_own_bug_is_a_traceback(atom: Atom, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(quantize, "run", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        atom("quantize", tmp_path)


HIDE_CURSOR = "\x1b[?25l"  # what drawing in place begins with


def test_progress_stays_off_stdout(
    atom: Atom, tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even on a terminal, which rich is told here that it writes to, where progress is drawn."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = atom("eval", tiny("llama"), "--ppl", text_file, "--limit", 1, "--json")
    assert code == 0 and last_json(out)["model"] == str(tiny("llama"))
    assert HIDE_CURSOR in err and HIDE_CURSOR not in out
    options = ["--calib", text_file, "--windows", 4, "--window-length", 32, "--scheme", "w4a16", "--no-gptq"]
    code, out, err = atom("quantize", tiny("llama"), *options, "-o", tmp_path / "out", "--json")
    assert code == 0 and last_json(out)["output"] == str(tmp_path / "out")
    assert HIDE_CURSOR in err and HIDE_CURSOR not in out
