"""What low-bit caches lose: perplexity, divergence and long-context retrieval by scheme, as the record cache-quality.

    python benchmarks/cache_quality.py measure MODEL --name NAME --calib train.txt --text test.txt --output OUT.json
    python benchmarks/cache_quality.py join part1.json part2.json ... --machine h200

Each scheme is calibrated (step `calibrated`) and, if it is among --train, distilled too (`trained`), and runs on the
reference path. Where the cache is all that is rounded, what was trained is measured through a 16-bit cache too: weights
may not only make up for the cache, but drift, and this tells how far. A part is rewritten after every row.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accuracy_run import AccuracyRun, Join, MeasureOptions
from measured import effective_bits, retrieval_keys
from parts import join_parts, scratch

from atom.calibration.distill_plan import default_steps
from atom.calibration.stream import quantize_and_distill, quantize_source
from atom.errors import AtomError
from atom.eval.load import Loaded
from atom.quant.presets import get_scheme, kv_name
from atom.quant.schemes import Scheme
from atom.records import Row

RECORD = "cache-quality"


@dataclass(frozen=True)
class Measure(MeasureOptions):
    """Measure one model."""

    schemes: tuple[str, ...] = ("bf16", "bf16+kv8", "bf16+kv4", "bf16+kv3", "bf16+kv2")
    """Presets with a cache; bf16, full precision, must be among them for the record."""

    train: tuple[str, ...] = ("bf16+kv4",)
    """Those of them that are distilled too."""

    untrained: bool = True
    """Measure those before they are distilled as well."""

    retrieval: tuple[int, ...] = ()
    """Contexts of long-context retrieval, in tokens."""

    contexts: int = 16
    """Of each of these lengths."""

    batch_tokens: int = 4096
    """Tokens that run at once in calibration."""

    distill_steps: int | None = None
    """Steps of distillation; default: the calibrator's."""

    distill_windows: int = 512
    """Windows of text to distil on."""

    distill_seconds: float = 600.0
    """At most so long for it."""


class Runner(AccuracyRun):
    """Measures one scheme after another of one model."""

    def __init__(self, options: Measure) -> None:
        super().__init__(
            options,
            batch_tokens=options.batch_tokens,
            distill_windows=options.distill_windows,
            distill_seconds=options.distill_seconds,
            distill_steps=0,
        )
        self.options = options
        self.last: tuple[Scheme, Loaded] | None = None  # what was calibrated last

    def run(self, name: str, is_trained: bool) -> None:
        """Add the rows of one scheme."""
        scheme = get_scheme(name)
        step = "trained" if is_trained else "calibrated" if scheme.is_quantized else "fp"
        key = {"scheme": scheme.name, "kv": kv_name(scheme), "step": step}
        if self.part.has(RECORD, {**key, "cache": key["kv"], "text": self.texts.texts[-1].name}):
            return
        started = time.perf_counter()
        with scratch(self.options.scratch) as folder:
            loaded, steps = self.loaded(scheme, folder / "checkpoint", is_trained)
            row = {"model": self.options.name, **key, "ppl_fp": None, **effective_bits(self.source, scheme)}
            row |= {"source": self.options.source, "seconds": round(time.perf_counter() - started, 1)}
            row |= self.calibration(steps)
            self.add_rows(row, loaded)
            if is_trained and scheme.weight is None:
                loaded.model.scheme = scheme.with_kv(None)
                self.add_rows(row, loaded)

    def add_rows(self, row: dict[str, Any], loaded: Loaded) -> None:
        """A row for each text, retrieval beside the first."""
        scheme = loaded.model.scheme
        row = {**row, "cache": "bf16" if scheme is None else kv_name(scheme)}
        full = None if loaded is self.full else self.full.model
        for number in range(len(self.texts.texts)):
            keys = self.texts.measure(loaded, number, full)
            if number == 0:
                keys |= retrieval_keys(loaded, self.options.retrieval, self.options.contexts)
            self.part.add(RECORD, row | keys)

    def loaded(self, scheme: Scheme, out: Path, is_trained: bool) -> tuple[Loaded, int]:
        """The model under `scheme`, and the steps it was trained for."""
        steps = 0
        if not scheme.is_quantized:
            return self.full, steps
        alike = replace(scheme, kv_recent=0)  # calibration finds the same, however many of the newest tokens are exact
        if not is_trained and self.last is not None and self.last[0] == alike:
            self.last[1].model.scheme = scheme
            return self.last[1], steps
        self.last = None  # its memory is free again
        if is_trained:
            config = replace(self.config, distill_steps=self.options.distill_steps or default_steps(scheme))
            found = quantize_and_distill(self.source, scheme, out, config, self.windows, self.distill_text).distilled
            assert found is not None
            steps = int(found["steps"])
            print("distilled", found, flush=True)
        else:
            quantize_source(self.source, scheme, out, self.config, self.windows)
        loaded = self.load(out)
        self.last = None if is_trained else (alike, loaded)
        return loaded, steps


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the other accuracy scripts
    runner = Runner(options)
    runner.prepare()
    for name in options.schemes:
        trains = name in options.train
        for is_trained in ([False] if options.untrained or not trains else []) + ([True] if trains else []):
            try:
                runner.run(name, is_trained)
            except (AtomError, ValueError, torch.OutOfMemoryError) as error:
                print(f"{options.name}: {name} not measured: {error}", flush=True)


def join(options: Join) -> None:
    join_parts(options.parts, [RECORD], options.commit, finish)


def finish(rows: list[Row]) -> None:
    """Write full precision's perplexity beside every other; keep the first of several rows of one measurement."""
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        first.setdefault(tuple(row[k] for k in ("model", "text", "scheme", "kv", "step", "cache")), row)
    full = {(row["model"], row["text"], row["windows"]): row["ppl"] for row in rows if row["step"] == "fp"}
    for row in first.values():
        row["ppl_fp"] = full[row["model"], row["text"], row["windows"]]
        row["percent"] = round(100 * (row["ppl"] / row["ppl_fp"] - 1), 3)
    rows[:] = first.values()


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
