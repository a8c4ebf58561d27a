"""Models served over HTTP under load, and their perplexity through the same server; the record `served`.

    python benchmarks/served.py run smollm2-w4a8 --scheme w4a8 --ppl wiki.txt --output build/served
    python benchmarks/served.py run llama-3-8b --scheme w4a8 --tokenizer smollm2-w4a8 --trace conv.csv.gz --speed 10 \\
        --output build/served
    python benchmarks/served.py join build/served
    atom report bench build/served/*.json

`run` starts `atom serve`, loads it as `atom bench serve` does (a closed loop, then a trace at its own arrival times),
and ends it. A shape has random weights: its speed is real, its text is not, and perplexity is not asked for.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import tyro

from atom.circumstances import circumstances, current_commit
from atom.commands.console import console
from atom.models.dummy import SHAPES
from atom.quant.presets import get_scheme, kv_name
from atom.serving.bench.config import ServeBenchConfig
from atom.serving.bench.joining import latest, read_parts, rows_of, write_joined
from atom.serving.bench.report_data import machine_name
from atom.serving.bench.result import KIND, ServeResult
from atom.serving.bench.serve import bench_serve

START_S = 180  # for a server to answer


@dataclass(frozen=True)
class Run:
    """Serve one model and load it."""

    model: Annotated[str, tyro.conf.Positional]
    """A checkpoint, a full-precision model, or a shape's name."""

    output: Path
    """Folder for the results, one file for each load."""

    scheme: str = "bf16"
    """The checkpoint's scheme, or the one that a shape gets."""

    label: str | None = None
    """What the model is called in the record; default: its own name."""

    tokenizer: Path | None = None
    """Of a shape: a folder with any tokenizer, which the server wants."""

    workload: str | None = "512/256"
    """Of the closed loop; none: no closed loop."""

    concurrency: int = 64
    """Clients of the closed loop."""

    num_requests: int = 256
    """Of the closed loop."""

    trace: Path | None = None
    """Also this trace, at its own arrival times."""

    speed: float = 1.0
    """Factor on the trace's clock."""

    trace_requests: int = 300
    """First requests of the trace."""

    slo: str = "ttft:500,tpot:50"
    """Limits of goodput, milliseconds."""

    ppl: Path | None = None
    """Also the perplexity of this text, through the server."""

    port: int = 8123
    """Of the server."""

    serve_args: str = ""
    """More options of atom serve, as one text."""


@dataclass(frozen=True)
class Join:
    """Write the record from the results in folders."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `run` filled."""


def run(options: Run) -> None:
    """Start the server, load it, end it."""
    name = options.label or Path(options.model).name
    server = subprocess.Popen([sys.executable, "-m", "atom", "serve", *serve_arguments(options)])
    try:
        wait(server, options.port)
        for load, config in loads(options, f"{name} {options.scheme}").items():
            result = bench_serve(config)
            console.print(result.table() + "\n", highlight=False, markup=False, soft_wrap=True)
            keep(result, options.output / f"{name}-{options.scheme}-{load}.json")
    finally:
        server.terminate()
        server.wait(60)


def serve_arguments(options: Run) -> list[str]:
    """What follows `atom serve`."""
    command = [options.model, "--port", str(options.port), "--log-level", "warning", *options.serve_args.split()]
    if options.model in SHAPES:
        command += ["--load-format", "dummy", "--scheme", options.scheme, "--tokenizer", str(options.tokenizer)]
    return command


def loads(options: Run, label: str) -> dict[str, ServeBenchConfig]:
    """The loads by name, the first with the perplexity."""
    common: dict[str, Any] = {"url": f"http://127.0.0.1:{options.port}", "slo": options.slo, "label": label}
    if options.model in SHAPES:
        common["token_ids"] = f"5:{min(30_000, SHAPES[options.model]['vocab_size'])}"
    found = {}
    if options.workload is not None:
        many = {"num_requests": options.num_requests, "max_concurrency": options.concurrency}
        found["closed"] = ServeBenchConfig(workload=options.workload, **many, **common, ppl=options.ppl)
    if options.trace is not None:
        some = {"num_requests": options.trace_requests, "trace_arrivals": True, "speed": options.speed, "seed": 1}
        found["trace"] = ServeBenchConfig(workload=f"trace:{options.trace}", **some, **common)
    return found


def wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Until a token comes; RuntimeError if the server ends or takes too long."""
    began = time.perf_counter()
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/generate", timeout=60).status_code == 200:
                console.print(f"serving after {time.perf_counter() - began:.1f} s", highlight=False)
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None or time.perf_counter() - began > START_S:
            raise RuntimeError(f"no token after {time.perf_counter() - began:.0f} s, exit code {server.poll()}")
        time.sleep(0.1)


def keep(result: ServeResult, file: Path) -> None:
    """Write the result without its requests, and with the machine that served: client and server share it here."""
    found = result.to_dict(with_samples=False) | circumstances(machine_name()) | {"commit": current_commit()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """A row of the record `served`, of one result."""
    model, _, scheme = found["config"]["label"].rpartition(" ")
    workload = str(found["config"]["workload"])
    kind, _, file = workload.partition(":")
    summary, quality = found["summary"], found["server"].get("perplexity") or {}
    spreads = {
        f"{measure}_ms_{name}": None if summary[measure] is None else round(summary[measure][name], 2)
        for measure in ("ttft", "tpot")
        for name in ("p50", "p99")
    }
    return {
        "model": model,
        "scheme": get_scheme(scheme).name,
        "kv": kv_name(get_scheme(scheme)),
        "workload": workload if kind != "trace" else f"trace:{Path(file).name.partition('.')[0]}",
        "load": found["config"]["arrivals"],
        "requests": summary["requests"],
        "errors": sum(summary["errors"].values()),
        "out_tok_s": round(summary["out_tok_s"], 1),
        "slo": found["config"]["slo"],
        "good": summary["good_requests"],
        **spreads,
        "ppl": None if not quality else round(quality["perplexity"], 3),
        "text": quality.get("text"),
        "windows": quality.get("windows"),
    }


def join(options: Join) -> None:
    """Write benchmarks/results/<machine>/served.json; of two loads of one thing the later counts."""
    files = [file for folder in options.folders for file in folder.glob("*.json")]
    parts = read_parts(files, KIND)
    if not parts:
        raise ValueError("these folders hold no result of a load; fill them with `run`")
    rows = latest(
        rows_of([part | {"rows": [row_of(part)]} for part in parts]), ("model", "scheme", "kv", "workload", "load")
    )
    console.print(f"wrote {write_joined('served', parts, rows)}")


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Join, tyro.conf.subcommand("join")],  # type: ignore[arg-type]
        description=__doc__,
    )
    run(chosen) if isinstance(chosen, Run) else join(chosen)
