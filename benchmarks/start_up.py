"""From a command to its first token, cold and warm: `atom serve` in a process of its own, asked as soon as it answers.

    python -m benchmarks.start_up smollm2-w4a8
    python -m benchmarks.start_up smollm2-w4a8 --cold         first with an empty cache of compiled kernels
    python -m benchmarks.start_up llama-3-8b --scheme w4a8    a shape, in process: random weights have no tokenizer
    python -m benchmarks.start_up --record FILE ...           the record engine-start, from what -o wrote

Times are seconds from the start of the process, Python's own included.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from atom.models.dummy import SHAPES
from atom.records import write_record

from .timing import keep

LIMIT_S = 600
CHILD = """
import json, sys, time
from atom.serving.engine_config import EngineConfig
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams
with LLM(sys.argv[1], load_format="dummy", scheme=sys.argv[2], **json.loads(sys.argv[3])) as llm:
    (found,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    assert len(found.token_ids) == 1
    times = {key: value for key, value in llm.ready.facts.items() if key.endswith("_s")}
    print(json.dumps({"at": time.time(), **times}), flush=True)
"""


def serve(model: str, options: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Start a server, ask for one token until it comes, end the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    command = [sys.executable, "-m", "atom", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health/generate", timeout=60)
                if answer.status_code == 200:
                    return {"first_token_s": round(time.perf_counter() - began, 2)}
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                raise RuntimeError(f"no token after {time.perf_counter() - began:.0f} s, exit code {process.poll()}")
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(60)


def in_process(shape: str, scheme: str, options: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The same for a shape with random weights; options as for a server, each with a value."""
    named = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(*[iter(options)] * 2, strict=True)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, shape, scheme, json.dumps(named)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {"first_token_s": round(found.pop("at") - began, 2), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint, or a shape")
    parser.add_argument("--scheme", default="w4a8", help="of a shape; of a checkpoint it is only noted")
    parser.add_argument("--cold", action="store_true", help="first with an empty ATOM_CACHE")
    parser.add_argument("--runs", type=int, default=2, help="warm ones")
    parser.add_argument("-o", "--out", help="write rows and circumstances there")
    parser.add_argument("--record", metavar="FILE", nargs="+", help="write the record from what -o wrote")
    args, options = parser.parse_known_args()
    if args.record:
        files = [json.loads(Path(file).read_text()) for file in args.record]
        rows = [row for file in files for row in file["rows"]]
        command = "python -m benchmarks.start_up"
        where, commit = files[0]["where"], files[0]["commit"]
        print(write_record("engine-start", rows, "h200", command=command, where=where, commit=commit))
        return
    rows = []
    with tempfile.TemporaryDirectory() as empty:
        for kind in ("cold",) * args.cold + ("warm",) * args.runs:
            environment = dict(os.environ) | ({"ATOM_CACHE": empty} if args.cold else {})
            if args.model in SHAPES:
                found = in_process(args.model, args.scheme, options, environment)
            else:
                found = serve(args.model, options, environment)
            rows.append({"model": Path(args.model).name, "scheme": args.scheme, "kind": kind, **found})
            print(json.dumps(rows[-1]), flush=True)
    keep("engine-start", rows, args.out, is_record=False)


if __name__ == "__main__":
    main()
