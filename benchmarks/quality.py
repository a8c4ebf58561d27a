"""Accuracy of the ladder and of all presets on real models, as the records quality-ladder, quality-presets, kv-rope,
and what other choices in the full recipe would give (quality-variants).

    python benchmarks/quality.py measure MODEL --name NAME --calib train.txt --text wikitext2=test.txt --output OUT.json
    python benchmarks/quality.py join part1.json part2.json ... --machine h200

Each model is measured into a part of its own, which is rewritten after every configuration, so that a stopped run
loses one of them; `join` writes the records. Every number comes from a checkpoint that was written to disk, loaded,
and run as a user would run it.
"""

import gc
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from atom.calibration.config import CalibrationConfig, Clip
from atom.calibration.data import Windows as CalibrationWindows
from atom.calibration.data import load_windows
from atom.calibration.ladder import ladder, scaled_outliers
from atom.calibration.stream import is_calibrated, quantize_source
from atom.errors import AtomError, UnsupportedError
from atom.eval.load import Loaded, load
from atom.eval.perplexity import Bos, make_windows, measure_perplexity
from atom.eval.perplexity import Windows as TestWindows
from atom.eval.texts import load_text
from atom.models.config import ModelConfig
from atom.models.source import load_tokenizer, open_source, read_config
from atom.quant.presets import PRESETS, get_scheme, kv_name
from atom.quant.schemes import Scheme
from atom.records import LADDER_STEPS, circumstances, write_record


@dataclass(frozen=True)
class Measure:
    """Measure one model."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory, GGUF file or hub id of the full-precision model."""

    name: str
    """What the records call it."""

    output: Path
    """The part to write; what it holds already is kept and not measured again."""

    calib: str = "wikitext2"
    """Calibration text, disjoint from the test texts."""

    text: tuple[str, ...] = ("wikitext2",)
    """Test texts; the first is for every configuration, the others for the full recipe and full precision."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks for the presets."""

    include_path: str | None = None
    """Folder of lm-eval task files."""

    task_limit: int | None = None
    """Documents of each task."""

    windows: int = 128
    """Calibration windows."""

    window_length: int = 2048
    """Tokens of a calibration window."""

    eval_window: int = 2048
    """Tokens of a test window."""

    limit: int | None = None
    """Test windows of each text."""

    bos: Bos = "auto"
    """As for atom eval."""

    what: tuple[Literal["ladder", "variants", "presets", "kv-rope", "scaled"], ...] = (
        "ladder",
        "presets",
        "kv-rope",
        "scaled",
    )
    """What to measure; variants are the full recipe with one choice made otherwise, scaled is it with the outlier count
    that is 128's share of 4096 channels."""

    kernels: bool = False
    """Measure the presets that have GPU kernels through these as well, in bfloat16: rows of their own."""

    kernel_schemes: tuple[str, ...] = ()
    """Only these presets through the kernels."""

    schemes: tuple[str, ...] = ()
    """Presets to measure: all, or the ones that time allows."""

    steps: tuple[str, ...] = LADDER_STEPS
    """Steps of the ladder to measure, in this order: all, or the ones that time allows."""

    variants: tuple[str, ...] = ()
    """Variants to measure, by name: all, or these."""

    device: str = "auto"
    """cpu or cuda."""

    machine: str = "cpu"
    """What the records call the machine: h200 or cpu."""

    source: str = ""
    """Where the weights come from (a GGUF's format, say); stands beside every number."""

    scratch: Path | None = None
    """Where checkpoints are written and removed again."""


@dataclass(frozen=True)
class Join:
    """Write the records from parts."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What measure wrote."""

    commit: str | None = None
    """The commit that was measured; default: the checkout's."""


@dataclass
class Part:
    """Rows by record name, kept on disk as they come."""

    path: Path
    where: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: str) -> "Part":
        found = json.loads(path.read_text()) if path.exists() else {}
        found.pop("where", None)
        return cls(path, circumstances(machine), found)

    def has(self, record: str, key: dict[str, Any]) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows.get(record, []))

    def add(self, record: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(record, []).append(row)
        self.write(record, row)

    def write(self, record: str, row: dict[str, Any]) -> None:
        """Write the part; `row`, of this record, is new or has changed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.rows, "where": self.where}, indent=1))
        print(record, json.dumps(row), flush=True)


@dataclass(frozen=True)
class Configuration:
    """One checkpoint to make and measure, and the records that its numbers belong to.

    step       rung of the ladder, or None
    is_preset  a row of quality-presets, with tasks and, where asked for, through the kernels
    variant    what is otherwise than in the full recipe: a row of quality-variants
    """

    scheme: Scheme
    gptq: bool
    clip: Clip = "measured"
    step: str | None = None
    is_preset: bool = False
    variant: str | None = None


def variants() -> list[Configuration]:
    """The full recipe with one choice made otherwise, the weights' grids first."""
    recipe = PRESETS["w4a4"]
    assert recipe.weight is not None and recipe.activation is not None
    whole = replace(recipe.weight, clip=1.0, scale_rule="max")
    unclipped = replace(recipe, weight=whole)
    schemes = {
        "weights unclipped": unclipped,
        "weights unclipped, 16-bit cache": replace(unclipped, kv=None, kv_offset="bias", kv_rotation="none"),
        "weights searched below the maximum": replace(recipe, weight=replace(recipe.weight, scale_rule="max")),
        "weights unclipped, bf16 scales": replace(recipe, weight=replace(whole, scale_format="bf16", outer=None)),
        "bf16 scales": replace(recipe, weight=replace(recipe.weight, scale_format="bf16", outer=None)),
    }
    found = [Configuration(scheme, True, variant=name) for name, scheme in schemes.items()]
    plain = replace(unclipped, activation=replace(recipe.activation, clip=1.0))
    found.append(Configuration(plain, True, "constant", variant="nothing clipped"))
    found.append(Configuration(unclipped, False, variant="weights unclipped, rounded to nearest"))
    return found


def configurations(options: Measure) -> list[Configuration]:
    """What `options` ask for, the ladder first; a rung that is a preset is made once for both."""
    found = []
    has_presets = "presets" in options.what
    if "ladder" in options.what:
        steps = {step.name: step for step in ladder(128)}
        for step in (steps[name] for name in options.steps):
            is_preset = has_presets and step.name in ("fp", "kv4")
            found.append(Configuration(step.scheme, step.gptq, step.clip, step.name, is_preset))
    if "variants" in options.what:
        found += [v for v in variants() if not options.variants or v.variant in options.variants]
    if has_presets:
        shared = [c.scheme for c in found if c.is_preset]
        schemes = [PRESETS["bf16"], *(s for s in PRESETS.values() if s.is_quantized)]  # first what others lose against
        schemes += [get_scheme(f"bf16+{kv}") for kv in ("kv4", "kv8", "kvfp8")]
        found += [
            Configuration(s, s.weight is not None and s.name not in ("w8a8", "fp8"), is_preset=True)
            for s in schemes
            if s not in shared and (not options.schemes or s.name in options.schemes)
        ]
    if "scaled" in options.what:
        raw, generation = read_config(options.model)
        count = scaled_outliers(ModelConfig.from_hf(raw, generation).hidden_size)
        step = next(step for step in ladder(count) if step.name == "kv4")
        found.append(Configuration(step.scheme, step.gptq, step.clip, step.name))
    return found


class Runner:
    """Makes, loads, measures and removes one checkpoint after another of the same model."""

    def __init__(self, options: Measure) -> None:
        self.options = options
        self.part = Part.open(options.output, options.machine)
        self.prepared: Any = None
        self.texts = [load_text(name) for name in options.text]
        self.source = open_source(options.model)
        self.tokenizer = load_tokenizer(self.source.path)
        self.kept: list[tuple[dict[str, Any], Path | str]] = []  # rows of presets, and the checkpoints they are of
        self.calibration = CalibrationConfig(
            calib=options.calib,
            windows=options.windows,
            window_length=options.window_length,
            device=options.device,
        )

    @cached_property
    def calibration_windows(self) -> CalibrationWindows:
        """The calibration text, tokenised once for all checkpoints."""
        c = self.calibration
        return load_windows(c.calib, self.tokenizer, c.windows, c.window_length, c.seed)

    @cache  # noqa: B019  the runner lives as long as the process
    def text_windows(self, number: int) -> TestWindows:
        """Test text `number`, tokenised once."""
        o = self.options
        return make_windows(self.tokenizer, self.texts[number], o.eval_window, o.bos, o.limit)

    def loaded(self, configuration: Configuration, folder: Path) -> tuple[Loaded, float]:
        """The model under a configuration, from a checkpoint that this makes, and the seconds that took."""
        scheme = configuration.scheme
        if not scheme.is_quantized:
            return load(self.options.model, self.options.device, "float32", "reference"), 0.0
        out = folder / "checkpoint"
        config = replace(self.calibration, gptq=configuration.gptq, clip=configuration.clip)
        windows = self.calibration_windows if is_calibrated(self.source, scheme) else None
        report = quantize_source(self.source, scheme, out, config, windows)
        return load(str(out), self.options.device, "float32", "reference"), float(report.totals["seconds"])

    def perplexity(self, loaded: Loaded, number: int) -> dict[str, Any]:
        """Of test text `number`."""
        text, windows = self.texts[number], self.text_windows(number)
        found = measure_perplexity(loaded.model, self.tokenizer, text, window=self.options.eval_window, windows=windows)
        return {
            "ppl": round(found.perplexity, 4),
            "windows": found.windows,
            "window": found.window,
            "path": loaded.path,
        }

    def bits(self, scheme: Scheme) -> dict[str, float]:
        config = ModelConfig.from_hf(self.source.config, self.source.generation_config)
        return {
            "bits_weight": round(scheme.weight_bits(config.hidden_size), 3),
            "bits_activation": round(scheme.activation_bits(config.hidden_size), 3),
            "bits_kv": round(scheme.kv_bits(config.head_dim), 3),
        }

    def common(self, seconds: float, gptq: bool) -> dict[str, Any]:
        how = f"{self.options.windows} x {self.options.window_length} of {Path(self.options.calib).name}"
        return {
            "source": self.options.source,
            "calibration": how + (", GPTQ" if gptq else ", rounded to nearest"),
            "seconds": round(seconds, 1),
        }

    def run(self, configuration: Configuration) -> None:
        """Measure one configuration, unless the part has its rows already."""
        scheme, text = configuration.scheme, self.texts[0].name
        of_ladder = {"model": self.options.name, "step": configuration.step, "outliers": scheme.outliers.count}
        of_presets = {"model": self.options.name, "scheme": scheme.name, "kv": kv_name(scheme)}
        to_ladder = configuration.step is not None and not self.part.has("quality-ladder", {**of_ladder, "text": text})
        to_presets = configuration.is_preset and not self.part.has("quality-presets", {**of_presets, "text": text})
        of_variants = {"model": self.options.name, "variant": configuration.variant}
        to_variants = configuration.variant is not None and not self.part.has("quality-variants", of_variants)
        if not to_ladder and not to_presets and not to_variants:
            return
        has_tasks = to_presets and bool(self.options.tasks)
        with scratch(self.options.scratch, has_tasks and scheme.is_quantized) as folder:
            loaded, seconds = self.loaded(configuration, folder)
            found = self.perplexity(loaded, 0)
            common = self.bits(scheme) | self.common(seconds, configuration.gptq)
            if to_ladder:
                self.part.add("quality-ladder", {**of_ladder, "text": text, **found, **common})
            if to_variants:
                self.part.add("quality-variants", {**of_variants, "text": text, **found, **common})
            if to_presets:
                row = {**of_presets, "text": text, **found, "ppl_fp": self.full(found["ppl"]), **common}
                self.part.add("quality-presets", row)
                if has_tasks:
                    self.kept.append((row, folder / "checkpoint" if scheme.is_quantized else self.options.model))
            if to_ladder and configuration.step in ("fp", "kv4"):
                for number, other in list(enumerate(self.texts))[1:]:
                    more = {**of_ladder, "text": other.name, **self.perplexity(loaded, number), **common}
                    self.part.add("quality-ladder", more)
            del loaded
            if to_presets and self.wants_kernels(scheme):
                self.add_kernels_row(folder, row)

    def full(self, default: float) -> float:
        """Full precision's perplexity, once it has been measured; else `default`."""
        rows = [*self.part.rows.get("quality-presets", []), *self.part.rows.get("quality-ladder", [])]
        is_full = [r for r in rows if (r.get("scheme"), r.get("kv")) == ("bf16", "bf16") or r.get("step") == "fp"]
        return float(next((r["ppl"] for r in is_full if r["text"] == self.texts[0].name), default))

    def wants_kernels(self, scheme: Scheme) -> bool:
        wanted = self.options.kernel_schemes
        return self.options.kernels and scheme.weight is not None and (not wanted or scheme.name in wanted)

    def add_kernels_row(self, folder: Path, reference: dict[str, Any]) -> None:
        """The same checkpoint and text through the kernels, if they run it here."""
        try:
            loaded = load(str(folder / "checkpoint"), self.options.device, "bfloat16", "auto")
        except UnsupportedError as error:
            print(f"{reference['scheme']}: not through the kernels: {error}", flush=True)
            return
        self.part.add("quality-presets", reference | self.perplexity(loaded, 0))

    def run_tasks(self) -> None:
        """Add the tasks to the rows of all presets, from their checkpoints; the least urgent numbers come last."""
        for row, checkpoint in self.kept:
            loaded = load(str(checkpoint), self.options.device, "float32", "reference")
            row.update(self.tasks(loaded))
            self.part.write("quality-presets", row)
            del loaded
            if isinstance(checkpoint, Path):
                shutil.rmtree(checkpoint.parent)

    def tasks(self, loaded: Loaded) -> dict[str, Any]:
        """lm-eval's tasks under one model."""
        from atom.eval.lm import AtomLM
        from atom.eval.tasks import prepare_tasks, run_tasks

        found: dict[str, Any] = {}
        if self.prepared is None:
            self.prepared = prepare_tasks(self.options.tasks, self.options.include_path)
        for task in run_tasks(AtomLM(loaded), self.prepared, limit=self.options.task_limit):
            _, metric = task.primary
            name = f"task:{task.task.removesuffix('_local')}"
            found[name] = round(metric.value, 4)
            found[f"{name}:stderr"] = None if metric.stderr is None else round(metric.stderr, 4)
        return found

    def run_kv_rope(self) -> None:
        """What rounding keys before RoPE would buy: weights and activations in full precision, 4-bit cache."""
        plain = PRESETS["bf16"].with_kv(PRESETS["w4a4"].kv)
        for place, pre in (("after", False), ("before", True)):
            if self.part.has("kv-rope", {"place": place}):
                continue
            scheme = replace(plain, kv_pre_rope=pre, kv_offset="bias", kv_rotation="none")
            with scratch(self.options.scratch) as folder:
                loaded, _ = self.loaded(Configuration(scheme, False), folder)
                row = {"model": self.options.name, "text": self.texts[0].name, "kv": kv_name(scheme), "place": place}
                self.part.add("kv-rope", row | self.perplexity(loaded, 0) | {"source": self.options.source})
                del loaded


class scratch:  # noqa: N801  a context manager, named as it reads
    """A folder that is gone afterwards unless it is kept, and the GPU memory of what was loaded from it as well."""

    def __init__(self, parent: Path | None, keeps: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        self.keeps = keeps

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        if not self.keeps:
            shutil.rmtree(self.folder)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: exact for INT4 codes under bf16 scales
    runner = Runner(options)
    for configuration in configurations(options):
        try:
            runner.run(configuration)
        except (AtomError, ValueError, torch.OutOfMemoryError) as error:
            print(f"{configuration.step or configuration.scheme.name}: not measured: {error}", flush=True)
    if "kv-rope" in options.what:
        runner.run_kv_rope()
    runner.run_tasks()


def join(options: Join) -> None:
    parts = [json.loads(path.read_text()) for path in options.parts]
    for name in ("quality-ladder", "quality-variants", "quality-presets", "kv-rope"):
        rows = [row for part in parts for row in part.get(name, [])]
        if rows:
            where = dict(parts[0]["where"])
            where["command"] += f" (and {len(parts) - 1} more models alike)" if len(parts) > 1 else ""
            print("wrote", write_record(name, rows, where["machine"]["name"], commit=options.commit, where=where))


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
