"""The benchmark of mixed steps: what it loads and asks for is what it times."""

import json
from pathlib import Path

import pytest

from atom.circumstances import circumstances
from atom.records import check_rows
from atom.serving import runner as runner_module
from atom.serving.batch import Step
from atom.serving.engine_config import EngineConfig
from atom.serving.rows import fits_rows
from atom.serving.startup import start_up
from benchmarks import mixed_steps
from benchmarks.mixed_steps import LOAD, PAIRS, STEPS, Loop, way


def test_rows_become_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = {"shape": "tiny", "scheme": "w4a8", "kv": "int4", "way": "rows"}
    times = dict.fromkeys(("decode_ms", "decode_alone_ms", "alone_ms", "first_ms", "host_ms", "adds_ms"), 1.0)
    step = {**what, "decodes": 64, "prompts": 1, "tokens": 25, **times}
    load = {**what, "memory_gb": 0, "workload": "512/256", "batch": 64, "turn": 0, "out_tok_s": 1.0}
    load |= {"max_num_batched_tokens": 8192, "admission_interval": 8}
    files = []
    for name, rows in ((STEPS, [step]), (LOAD, [load])):
        check_rows(name, rows)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"rows": rows, "where": circumstances("cpu"), "commit": "abc"}))
    written = []
    monkeypatch.setattr(mixed_steps, "write_record", lambda name, rows, machine, **rest: written.append((name, rows)))
    mixed_steps.join(files[::-1])
    assert written == [(STEPS, [step]), (LOAD, [load])]


def test_ways_are_taken_and_left_again() -> None:
    with way("rows"):
        assert runner_module.fits_rows is not fits_rows
    with way("engine"):
        assert runner_module.fits_rows is fits_rows
    assert runner_module.fits_rows is fits_rows


def test_mixed_steps_are_those_asked_for() -> None:
    options = EngineConfig(load_format="dummy", scheme="w4a8", device="cpu", max_num_seqs=4, max_model_len=512)
    ready = start_up("tiny", options)
    seen: list[tuple[int, int]] = []
    launch = ready.runner.launch

    def counted(step: Step):  # type: ignore[no-untyped-def]
        seen.append((step.batch.num_decodes, step.batch.num_tokens))
        return launch(step)

    ready.runner.launch = counted  # type: ignore[method-assign]
    loop = Loop(ready.runner, ready.limits, 3, 32)
    seen.clear()
    assert loop.pairs(1, 5) > 0
    assert seen == [(3, 3), (3, 8)] * PAIRS
    seen.clear()
    assert all(ms > 0 for ms in loop.alone(1, 7))
    assert seen == [(3, 10)] * 5
    loop.end()
    assert not loop.scheduler.has_unfinished
