"""The quality records, from a model to rows, on a tiny model: a rung that is a preset is made once for both."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atom.circumstances import CHECKOUT
from atom.eval.load import load
from atom.records import check_rows

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
from measured import change_keys
from quality import Runner, fill_in_full_precision, measure
from quality_plan import Measure, configurations


def tiny_measure(tiny_run: dict[str, Any], **more: Any) -> Measure:
    small = {"schemes": ("w4a4",), "distill_steps": 2, "distill_tokens": 128}
    return Measure(**tiny_run, **small, what=("ladder", "presets"), **more)


def test_rows_of_a_tiny_model(tiny_run: dict[str, Any]) -> None:
    options = tiny_measure(tiny_run, steps=("fp", "kv4", "distill"))
    measure(options)
    part = json.loads(options.output.read_text())
    assert [row["step"] for row in part["quality-ladder"]] == ["fp", "kv4", "distill"]
    presets = {(row["scheme"], row["kv"], row["distill_steps"]): row for row in part["quality-presets"]}
    assert presets["w4a4", "int4", 0]["ppl"] == part["quality-ladder"][1]["ppl"]
    assert presets["w4a4", "int4", 2]["ppl"] == part["quality-ladder"][2]["ppl"]
    assert not list(tiny_run["scratch"].iterdir())  # every checkpoint is gone
    for name in ("quality-ladder", "quality-presets"):
        rows = part[name]
        if name == "quality-presets":
            fill_in_full_precision(rows)
        check_rows(name, rows)


def test_a_distilled_checkpoint_lies_there_until_it_was_used(tiny_run: dict[str, Any]) -> None:
    """It is made beside the rounded one where that was not measured before it."""
    options = tiny_measure(tiny_run, steps=("distill",), distilled=())
    runner = Runner(options)
    distil = configurations(options)[0]
    runner.run(distil)
    (_, checkpoint), *more = runner.kept
    assert not more and isinstance(checkpoint, Path) and (checkpoint / "config.json").is_file()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    runner.forget()
    assert not list(tiny_run["scratch"].iterdir())


def test_a_change_has_the_standard_error_of_its_windows(tiny_run: dict[str, Any]) -> None:
    """Each window 1 % or 3 % worse than the reference: 2 % on average, and the error is of the pairs alone."""
    runner = Runner(tiny_measure(tiny_run))
    reference = runner.texts.score(load(tiny_run["model"], "cpu", "float32", "reference"))
    nats = tuple(nll + part for nll, part in zip(reference.window_nll, (0.01, 0.03), strict=True))
    worse = replace(reference, window_nll=nats, perplexity=reference.perplexity * math.exp(0.02))
    keys = change_keys(reference, worse)
    assert keys["change"] == pytest.approx(math.expm1(0.02), abs=1e-6)
    assert keys["change_se"] == pytest.approx(0.01, abs=1e-6)  # standard deviation 0.0141 of 2 windows
    assert keys["ppl_reference"] == round(reference.perplexity, 4)
