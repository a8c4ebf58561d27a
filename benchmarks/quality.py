"""Accuracy of the ladder and of all presets on real models, as the records quality-ladder, quality-presets, kv-rope,
and what other choices in the full recipe would give (quality-variants).

    python benchmarks/quality.py measure MODEL --name NAME --calib train.txt --text wikitext2=test.txt --output OUT.json
    python benchmarks/quality.py join part1.json part2.json ...

Each model is measured into a part of its own, which is rewritten after every configuration, so that a stopped run
loses one of them; `join` writes the records. Every number comes from a checkpoint that was written to disk, loaded,
and run as a user would run it.
"""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from accuracy_run import AccuracyRun, Join
from measured import Tasks, change_keys, effective_bits, fill_in_full_precision, perplexity_keys
from parts import join_parts, scratch
from quality_plan import Configuration, Measure, Rounding, configurations

from atom.calibration.distill import distill_checkpoint
from atom.calibration.report import Report
from atom.calibration.stream import is_calibrated, quantize_source
from atom.errors import AtomError, UnsupportedError
from atom.eval.load import Loaded, load
from atom.eval.perplexity import Perplexity
from atom.kernels.registry import Kernels
from atom.quant.presets import PRESETS, get_scheme, kv_name
from atom.records import Row

UNLIMITED = 1e6  # seconds: rows of one record are of equally many steps


class Runner(AccuracyRun):
    """Makes, loads, measures and removes one checkpoint after another of the same model."""

    def __init__(self, options: Measure) -> None:
        super().__init__(options, options.bos, distill_tokens=options.distill_tokens)
        self.options = options
        self.tasks = Tasks(options.tasks, options.include_path, options.task_limit)
        self.kept: list[tuple[Row, Path | None]] = []  # rows of presets, their checkpoints (none: full precision)
        self.rounded: tuple[Rounding, Path, Report] | None = None  # the last one; it lies there while it is needed

    def loaded(self, configuration: Configuration, folder: Path) -> tuple[Loaded, float]:
        """The model under a configuration, from a checkpoint that this makes in `folder`, and the seconds that took."""
        if not configuration.scheme.is_quantized:
            return self.load(self.source.path), 0.0
        out = folder / "checkpoint"
        if configuration.distilled:
            seconds = self.distil(configuration, folder / "rounded", out)
        else:
            report = self.round(configuration, out)
            self.rounded = (configuration.rounding, out, report)
            seconds = float(report.totals["seconds"])
        return self.load(out), seconds

    def round(self, configuration: Configuration, out: Path) -> Report:
        """Make the checkpoint of a configuration up to distillation."""
        scheme = configuration.scheme
        config = replace(self.config, gptq=configuration.gptq, clip=configuration.clip)
        windows = self.windows if is_calibrated(self.source, scheme) else None
        return quantize_source(self.source, scheme, out, config, windows)

    def distil(self, configuration: Configuration, rounded: Path, out: Path) -> float:
        """Distil the checkpoint that was rounded before if it is the same, else one made at `rounded`; seconds."""
        if self.rounded is None or self.rounded[0] != configuration.rounding or not self.rounded[1].exists():
            self.rounded = (configuration.rounding, rounded, self.round(configuration, rounded))
        config = replace(self.config, distill_steps=self.options.distill_steps, distill_seconds=UNLIMITED)
        _, checkpoint, report = self.rounded
        found = distill_checkpoint(self.source, checkpoint, out, self.distill_text, config)
        print("distilled", json.dumps(found.to_dict()), flush=True)
        return float(report.totals["seconds"]) + found.seconds

    def common(self, seconds: float, configuration: Configuration) -> dict[str, Any]:
        """Keys of a row: where the weights are from, what was done to them, and how long it took."""
        how = ", GPTQ" if configuration.gptq else ", rounded to nearest"
        steps = self.options.distill_steps if configuration.distilled else 0
        return {"source": self.options.source, **self.calibration(steps, how), "seconds": round(seconds, 1)}

    def run(self, configuration: Configuration, following: Configuration | None = None) -> None:
        """Measure one configuration, unless the part has its rows already; keep what the following one will distil."""
        scheme, text = configuration.scheme, self.texts.texts[0].name
        of_ladder = {"model": self.options.name, "step": configuration.step, "outliers": scheme.outliers.count}
        steps = self.options.distill_steps if configuration.distilled else 0
        of_presets = {"model": self.options.name, "scheme": scheme.name, "kv": kv_name(scheme), "distill_steps": steps}
        to_ladder = configuration.step is not None and not self.part.has("quality-ladder", {**of_ladder, "text": text})
        to_presets = configuration.is_preset and not self.part.has("quality-presets", {**of_presets, "text": text})
        of_variants = {"model": self.options.name, "variant": configuration.variant}
        to_variants = configuration.variant is not None and not self.part.has("quality-variants", of_variants)
        if not to_ladder and not to_presets and not to_variants:
            return
        distilled_next = following is not None and following.distilled and following.rounding == configuration.rounding
        with scratch(self.options.scratch, scheme.is_quantized and (to_presets or distilled_next)) as folder:
            loaded, seconds = self.loaded(configuration, folder)
            found = self.texts.measure(loaded)
            common = effective_bits(self.source, scheme) | self.common(seconds, configuration)
            if to_ladder:
                self.part.add("quality-ladder", {**of_ladder, "text": text, **found, **common})
            if to_variants:
                self.part.add("quality-variants", {**of_variants, "text": text, **found, **common})
            if to_presets:
                row = {**of_presets, "text": text, **found, "ppl_fp": None, **common}
                self.part.add("quality-presets", row)
                self.kept.append((row, folder / "checkpoint" if scheme.is_quantized else None))
            if to_ladder and configuration.step in self.options.other_texts:
                for number, other in list(enumerate(self.texts.texts))[1:]:
                    more = {**of_ladder, "text": other.name, **self.texts.measure(loaded, number), **common}
                    self.part.add("quality-ladder", more)
            del loaded
        if configuration.distilled and self.rounded is not None:
            rounded = self.rounded[1]
            if all(rounded != checkpoint for _, checkpoint in self.kept):
                shutil.rmtree(rounded if rounded.parent == folder else rounded.parent, ignore_errors=True)

    def run_kernels(self) -> None:
        """The presets' last checkpoints in bfloat16, on the reference path and through kernels, where they run here.

        The kernels' rows say how far they are from the reference.
        """
        paths: tuple[Kernels, ...] = ("reference", "auto")
        wanted = self.options.kernel_schemes or tuple(PRESETS)
        last = {row["scheme"]: row for row, checkpoint in self.kept if checkpoint is not None}
        for row, checkpoint in self.kept:
            if checkpoint is None or row["scheme"] not in wanted or row is not last.get(row["scheme"]):
                continue
            reference: Perplexity | None = None
            for kernels in paths:
                try:
                    loaded = load(str(checkpoint), self.options.device, "bfloat16", kernels)
                except UnsupportedError as error:
                    print(f"{row['scheme']}: not through the kernels: {error}", flush=True)
                    continue
                found = self.texts.score(loaded)
                change = {} if reference is None else change_keys(reference, found)
                self.part.add("quality-presets", row | perplexity_keys(loaded, found) | change)
                reference = reference or found
                del loaded

    def run_tasks(self) -> None:
        """Add the tasks to the presets' rows."""
        for row, checkpoint in self.kept:
            loaded = self.load(checkpoint or self.source.path)
            row.update(self.tasks.measure(loaded))
            self.part.write("quality-presets", row)
            del loaded

    def forget(self) -> None:
        """Remove the presets' checkpoints."""
        for _, checkpoint in self.kept:
            if checkpoint is not None:
                shutil.rmtree(checkpoint.parent, ignore_errors=True)

    def run_kv_rope(self) -> None:
        """What rounding keys before RoPE would buy: weights and activations in full precision, 4-bit cache."""
        best = get_scheme("bf16+kv4")
        plain = replace(best, kv_offset="bias", kv_rotation="none")
        places = {
            "16 bits": PRESETS["bf16"],
            "after": plain,
            "before": replace(plain, kv_pre_rope=True),
            "after, calibrated": best,
        }
        for place, scheme in places.items():
            if self.part.has("kv-rope", {"place": place}):
                continue
            with scratch(self.options.scratch) as folder:
                loaded, _ = self.loaded(Configuration(scheme, False), folder)
                row = {
                    "model": self.options.name,
                    "text": self.texts.texts[0].name,
                    "kv": kv_name(scheme),
                    "place": place,
                }
                self.part.add("kv-rope", row | self.texts.measure(loaded) | {"source": self.options.source})
                del loaded


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: exact for INT4 codes under bf16 scales
    runner = Runner(options)
    for configuration, following in pairwise([*configurations(options), None]):
        assert configuration is not None
        try:
            runner.run(configuration, following)
        except (AtomError, ValueError, RuntimeError) as error:
            print(f"{configuration.step or configuration.scheme.name}: not measured: {error}", flush=True)
    if "kv-rope" in options.what:
        runner.run_kv_rope()
    if options.kernels:
        runner.run_kernels()
    if options.tasks:
        runner.run_tasks()
    runner.forget()


def join(options: Join) -> None:
    join_parts(options.parts, ("quality-ladder", "quality-variants", "kv-rope"), options.commit)
    join_parts(options.parts, ("quality-presets",), options.commit, fill_in_full_precision)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
