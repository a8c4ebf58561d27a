"""Ways to quantize weights and activations, compared under one protocol, as the record accuracy-frontier.

    python benchmarks/accuracy_frontier.py measure MODEL --name NAME --calib train.txt --text test.txt --output OUT.json
    python benchmarks/accuracy_frontier.py join part1.json part2.json ... --machine h200

The methods are those of atom.calibration.methods. Each writes a checkpoint, which is loaded and run on the reference
path, as in quality.py, with --kernels also through the kernels; `flatquant` alone runs in memory. A part is rewritten
after every row, so that a stopped run loses one of them; `join` writes the record.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from accuracy_run import AccuracyRun, Join, MeasureOptions
from gaps import WINDOW_LOSSES, add_gaps
from measured import (
    Tasks,
    effective_bits,
    fill_in_full_precision,
    perplexity_keys,
    recovery_keys,
    retrieval_keys,
    task_keys,
)
from parts import join_parts, scratch

from atom.calibration.config import CalibrationConfig, ScaleSearch
from atom.calibration.flatquant import FlatConfig, flatten_model
from atom.calibration.methods import Bits, Method, methods, with_cache
from atom.calibration.stream import quantize_and_distill, quantize_source
from atom.errors import AtomError, UnsupportedError
from atom.eval.engine import EngineGenerator
from atom.eval.load import Loaded, load
from atom.eval.results import TaskResult
from atom.models.model import Model
from atom.quant.presets import get_scheme, kv_name
from atom.quant.schemes import Scheme
from atom.records import Row

RECORD = "accuracy-frontier"
COMPARED = ("fp", "atom", "ours")  # on all texts
SCHEMES: tuple[Bits, ...] = ("w4a4", "w4a8", "kv4")


@dataclass(frozen=True)
class Measure(MeasureOptions):
    """Measure one model."""

    text: tuple[str, ...] = ("wikitext2",)
    """Test texts; the first is for every method, the others for `fp`, `atom` and `ours`."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks for `fp` and `ours`, and what `ours` keeps of full precision's mean over them."""

    generative: tuple[str, ...] = ()
    """lm-eval tasks for `fp` and `ours` in bfloat16, through the kernels, generated on the engine that serves."""

    retrieval: tuple[int, ...] = ()
    """Contexts of long-context retrieval, in tokens, for `fp`, `atom` and `ours`."""

    schemes: tuple[Bits, ...] = SCHEMES
    """w4a4, w4a8, and kv4: the cache alone."""

    methods: tuple[str, ...] = tuple(methods("w4a4"))
    """Which methods, in this order."""

    kv: str = "kv4"
    """The cache of all methods of w4a4 and w4a8: kv4, kv8, kvfp8 or kv16."""

    recent: int = 0
    """Read the checkpoint of `ours` once more, so many newest tokens as they were before rounding: 16, 32 or 64."""

    kernels: bool = False
    """Measure `ours` through the kernels too, on a GPU that has them."""

    divergence: bool = True
    """Measure the divergence of predictions from full precision too, beside perplexity on the first text."""

    batch_tokens: int = 4096
    """Tokens that run at once in calibration."""

    distill_steps: int = 2000
    """Steps of the distillation of `ours`."""

    distill_seconds: float = 600.0
    """At most so long for it."""

    distill_tokens: int = 4096
    """Tokens of a step of it."""

    distill_rate: float = CalibrationConfig.distill_rate
    """Its learning rate."""

    distill_codes: bool = False
    """Codes learn as well."""

    true_sequential: bool = False
    """GPTQ of `ours` sees what the rounded linears before it in a layer give."""

    scale_search: ScaleSearch = "rounding"
    """How the weights' scales of `ours` are searched."""

    act_order: bool = False
    """GPTQ of `ours` takes the loudest columns of each group first."""

    flat_steps: int = 60
    """Training steps of each layer for flatquant."""

    flat_batch: int = FlatConfig.batch
    """Windows of each of them."""

    flat_seconds: float = float("inf")
    """At most so long for all of them."""


class Runner(AccuracyRun):
    """Measures one method after another of one model."""

    def __init__(self, options: Measure) -> None:
        super().__init__(
            options,
            batch_tokens=options.batch_tokens,
            distill_seconds=options.distill_seconds,
            distill_tokens=options.distill_tokens,
            distill_rate=options.distill_rate,
        )
        self.options = options
        self.tasks = Tasks(options.tasks, options.include_path, options.task_limit)
        self.generative = Tasks(options.generative, options.include_path, options.task_limit)
        self.full_generative: tuple[TaskResult, ...] = ()  # full precision's, once they ran
        self.distilled = 0  # steps of the method at work
        self.share = 1.0  # of what they learned that the checkpoint has
        self.flat_steps = 0  # of each layer, likewise

    def run(self, method: Method, bits: Bits) -> None:
        scheme = method.scheme
        if method.name != "fp" and scheme.kv is None:
            scheme = with_cache(scheme, self.options.kv)
        key = {"method": method.name, "text": self.texts.texts[0].name}
        if self.part.has(RECORD, key if method.name == "fp" else {**key, "scheme": bits}):
            return
        started = time.perf_counter()
        with scratch(self.options.scratch) as folder:
            loaded = self.loaded(method, scheme, folder)
            row = {"model": self.options.name, "method": method.name, "scheme": bits, "kv": kv_name(scheme)}
            row |= {} if scheme.kv is None or scheme.kv.symmetric else {"kv_zero": scheme.kv.zero}
            row |= effective_bits(self.source, scheme) | {"ppl_fp": None}
            row |= {"source": self.options.source, "seconds": round(time.perf_counter() - started, 1)}
            row |= {} if method.name == "fp" else self.described()
            if self.distilled and self.share == 0.0:
                row["note"] = (
                    "training did not lower the divergence on held-back text: the checkpoint is as GPTQ left it"
                )
            row |= {"distill_share": self.share} if self.distilled else {}
            if method.learned:
                row["note"] = (
                    f"run in memory: its transforms have no place in a checkpoint; {self.options.flat_batch} "
                    "windows a step"
                )
                row["flat_steps"] = self.flat_steps
            is_compared, is_full = method.name in COMPARED, method.name == "fp"
            full = self.full.model if self.options.divergence and not is_full else None
            first = row | self.scored(loaded, 0, full)
            self.part.add(RECORD, first)
            for number in range(1, len(self.texts.texts) if is_compared else 1):
                self.part.add(RECORD, row | self.scored(loaded, number))
            if self.options.recent and method.name == "ours" and scheme.kv is not None:
                self.add_recent_rows(loaded, scheme, row)
            if method.name in ("fp", "ours") and self.tasks.names:
                found = self.full_tasks if is_full else self.tasks.run(loaded)
                self.extend(first, task_keys(found) | ({} if is_full else recovery_keys(self.full_tasks, found)))
            if is_compared and self.options.retrieval:
                self.extend(first, retrieval_keys(loaded, self.options.retrieval))
            del loaded
            is_ours = method.name == "ours" and scheme.weight is not None
            if self.options.kernels and is_ours:
                self.add_kernels_row(folder / "checkpoint", row)
            if self.generative.names and (is_full or is_ours):
                self.add_generative_row(folder / "checkpoint" if is_ours else self.source.path, row)

    def scored(self, loaded: Loaded, number: int, full: Model | None = None) -> dict[str, Any]:
        """Keys of a row for text `number`, with the mean loss of each window, which `join` makes intervals of."""
        found = self.texts.score(loaded, number, full)
        return perplexity_keys(loaded, found) | {WINDOW_LOSSES: [round(loss, 6) for loss in found.window_nll]}

    def add_recent_rows(self, loaded: Loaded, scheme: Scheme, row: dict[str, Any]) -> None:
        """The same checkpoint on all texts, its newest tokens read exactly."""
        window = replace(scheme, kv_recent=self.options.recent)
        row = row | {"kv_recent": window.kv_recent} | effective_bits(self.source, window)
        loaded.model.scheme = window
        try:
            for number in range(len(self.texts.texts)):
                full = self.full.model if self.options.divergence and number == 0 else None
                self.part.add(RECORD, row | self.scored(loaded, number, full))
        finally:
            loaded.model.scheme = scheme

    def extend(self, row: dict[str, Any], keys: dict[str, Any]) -> None:
        """Add keys to a row of the part."""
        row.update(keys)
        self.part.write(RECORD, row)

    @cached_property
    def full_tasks(self) -> tuple[TaskResult, ...]:
        """What the full-precision model scores, document by document."""
        return self.tasks.run(self.full)

    def add_kernels_row(self, checkpoint: Path, row: dict[str, Any]) -> None:
        """The same checkpoint and text in bfloat16, through the kernels, if they run here."""
        if (loaded := self.kernels(checkpoint, row)) is not None:
            self.part.add(RECORD, row | self.texts.measure(loaded))

    def add_generative_row(self, where: Path, row: dict[str, Any]) -> None:
        """The first text, and tasks generated on the engine, in bfloat16 through the kernels."""
        if (loaded := self.kernels(where, row)) is None:
            return
        first = row | self.texts.measure(loaded)
        with EngineGenerator(str(where), device=self.options.device, kv_cache_bytes="8GiB") as engine:
            found = self.generative.run(loaded, engine)
        is_full = row["method"] == "fp"
        self.full_generative = found if is_full else self.full_generative
        keys = {} if is_full or not self.full_generative else recovery_keys(self.full_generative, found)
        self.part.add(RECORD, first | task_keys(found) | keys)

    def kernels(self, where: Path, row: dict[str, Any]) -> Loaded | None:
        """The model as it is served, in bfloat16; None where the kernels do not run it."""
        try:
            return load(str(where), self.options.device, "bfloat16", "auto")
        except UnsupportedError as error:
            print(f"{row['scheme']}: not through the kernels: {error}", flush=True)
            return None

    def loaded(self, method: Method, scheme: Scheme, folder: Path) -> Loaded:
        """The model as `method` quantizes it."""
        self.distilled = 0
        if not scheme.is_quantized:
            return self.full
        if method.learned:
            return self.flattened(method, scheme)
        config, out = method.config(self.config), folder / "checkpoint"
        if config.distill_steps:
            config = self.as_ours(config)
            found = quantize_and_distill(self.source, scheme, out, config, self.windows, self.distill_text).distilled
            assert found is not None
            self.distilled = int(found["steps"])
            self.share = found["share"]
            print("distilled", found, flush=True)
        else:
            quantize_source(self.source, scheme, out, config, self.windows)
        return self.load(out)

    def as_ours(self, config: CalibrationConfig) -> CalibrationConfig:
        """`config` with what only `ours` may have."""
        o = self.options
        steps = {"distill_steps": o.distill_steps, "distill_codes": o.distill_codes}
        gptq = {"true_sequential": o.true_sequential, "scale_search": o.scale_search, "act_order": o.act_order}
        return replace(config, **steps, **gptq)  # type: ignore[arg-type]

    @cached_property
    def prepared(self) -> "TemporaryDirectory[str]":
        """Where `cached` holds keys prepared for the cache, and weights as they are: for all that is run in memory."""
        folder = TemporaryDirectory(dir=self.options.scratch)
        cached = with_cache(get_scheme("bf16"), self.options.kv)
        quantize_source(self.source, cached, Path(folder.name) / "cached", self.config, self.windows)
        return folder

    def flattened(self, method: Method, scheme: Scheme) -> Loaded:
        """The model under learned transforms, in memory."""
        cached = with_cache(get_scheme("bf16"), self.options.kv)
        loaded = self.load(Path(self.prepared.name) / "cached" if cached.is_quantized else self.source.path)
        bits = 8 if scheme.activation is None or scheme.activation.format == "int8" else 4
        o = self.options
        settings = FlatConfig(
            method.learned, activation_bits=bits, steps=o.flat_steps, batch=o.flat_batch, seconds=o.flat_seconds
        )
        made = flatten_model(loaded.model, self.windows.tokens[:64], cached, settings)["steps"]
        self.flat_steps = sum(made) // len(made)
        return loaded

    def described(self) -> dict[str, Any]:
        """Keys of a row: on what the method at work was calibrated and distilled, and what only `ours` has."""
        o, keys = self.options, self.calibration(self.distilled)
        switches = {"codes too": o.distill_codes, "true-sequential": o.true_sequential, "act-order": o.act_order}
        switches["scales searched with feedback"] = o.scale_search == "feedback"
        switches[f"at a rate of {o.distill_rate:g}"] = o.distill_rate != CalibrationConfig.distill_rate
        if self.distilled:
            keys["calibration"] += "".join(f", {name}" for name, is_on in switches.items() if is_on)
        return keys


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: exact for INT4 codes under bf16 scales
    runner = Runner(options)
    runner.prepare()
    for name, bits in in_turn(options.methods, options.schemes):
        method = methods(bits).get(name)
        if method is None:
            continue
        try:
            runner.run(method, bits)
        except (AtomError, ValueError, torch.OutOfMemoryError) as error:
            print(f"{options.name}, {bits}: {name} not measured: {error}", flush=True)


def in_turn(names: Sequence[str], schemes: Sequence[Bits]) -> list[tuple[str, Bits]]:
    """Methods and schemes, those first that a stopped run needs most: the compared methods, scheme by scheme; those
    whose transforms are learned, which take longest, last."""
    learned = {method.name for bits in schemes for method in methods(bits).values() if method.learned}
    ranks = {name: (name not in COMPARED) + (name in learned) for name in names}
    return [(name, bits) for rank in range(3) for bits in schemes for name in names if ranks[name] == rank]


def join(options: Join) -> None:
    join_parts(options.parts, [RECORD], options.commit, finish)


def finish(rows: list[Row]) -> None:
    """Keep the first of several rows of one measurement, sorted; full precision stands beside every scheme.

    Caches whose zero points keep the mean (`kv_zero`) take the places of those before there were any. Full precision
    is the same in all rows: what a later one knows besides, of tasks say, is added to the first. A later row of another
    method that was asked for tasks, where the first was not, stays as what it is: an `earlier` run.
    """
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        is_full = row["method"] == "fp"
        key = tuple(row[k] for k in ("model", "text", "method", "path", "dtype"))
        key += (None if is_full else row["scheme"], row.get("kv_recent"))
        if is_full:
            first[key] = {**row, **first.get(key, {})}
        elif "recovery" in row and "recovery" not in first.get(key, row):
            first.setdefault((*key, "earlier"), {**row, "earlier": True})
        else:
            first.setdefault(key, row)
    known = {(row["model"], row["text"], row["scheme"]) for row in rows}
    full = [row for row in first.values() if row["method"] == "fp"]
    beside = [{**row, "scheme": scheme} for row in full for scheme in SCHEMES]
    others = [row for row in first.values() if row["method"] != "fp"]
    orders = {
        "scheme": list(SCHEMES),
        "text": list(dict.fromkeys(row["text"] for row in rows)),
        "method": list(methods("w4a4")),
        "model": list(dict.fromkeys(row["model"] for row in rows)),
        "path": ["reference", "kernels"],
    }
    kept = [row for row in beside if (row["model"], row["text"], row["scheme"]) in known]
    rows[:] = sorted([*kept, *others], key=lambda row: [order.index(row[key]) for key, order in orders.items()])
    fill_in_full_precision(rows)
    add_gaps(rows)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
