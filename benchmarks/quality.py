"""Accuracy of the ladder and of all presets on real models, as the records quality-ladder, quality-presets, kv-rope.

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
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from atom.calibration.config import CalibrationConfig, Clip
from atom.calibration.ladder import ladder, scaled_outliers
from atom.calibration.stream import quantize_model
from atom.errors import UnsupportedError
from atom.eval.load import Loaded, load
from atom.eval.perplexity import Bos, measure_perplexity
from atom.eval.texts import Text, load_text
from atom.models.config import ModelConfig
from atom.models.source import read_config
from atom.quant.presets import PRESETS, kv_name
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

    what: tuple[Literal["ladder", "presets", "kv-rope", "scaled"], ...] = ("ladder", "presets", "kv-rope", "scaled")
    """What to measure; scaled is the full recipe with the outlier count that is 128's share of 4096 channels."""

    kernels: bool = False
    """Measure the presets that have GPU kernels through these as well, in bfloat16: rows of their own."""

    steps: tuple[str, ...] = LADDER_STEPS
    """Steps of the ladder to measure: all, or the ones that time allows."""

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.rows, "where": self.where}, indent=1))
        print(record, json.dumps(row), flush=True)


class Runner:
    """Makes, loads, measures and removes one checkpoint after another of the same model."""

    def __init__(self, options: Measure) -> None:
        self.options = options
        self.part = Part.open(options.output, options.machine)
        self.prepared: Any = None
        self.texts = [load_text(name) for name in options.text]
        self.calibration = CalibrationConfig(
            calib=options.calib,
            windows=options.windows,
            window_length=options.window_length,
            device=options.device,
        )

    def loaded(self, scheme: Scheme, gptq: bool, folder: Path, clip: Clip = "measured") -> tuple[Loaded, float]:
        """The model under `scheme`, from a checkpoint that this makes, and the seconds that took."""
        if not scheme.is_quantized:
            return load(self.options.model, self.options.device, "float32", "reference"), 0.0
        out = folder / "checkpoint"
        report = quantize_model(self.options.model, scheme, out, replace(self.calibration, gptq=gptq, clip=clip))
        return load(str(out), self.options.device, "float32", "reference"), float(report.totals["seconds"])

    def perplexity(self, loaded: Loaded, text: Text) -> dict[str, Any]:
        found = measure_perplexity(
            loaded.model,
            loaded.tokenizer,
            text,
            window=self.options.eval_window,
            limit=self.options.limit,
            bos=self.options.bos,
        )
        return {
            "ppl": round(found.perplexity, 4),
            "windows": found.windows,
            "window": found.window,
            "path": loaded.path,
        }

    def bits(self, loaded: Loaded, scheme: Scheme) -> dict[str, float]:
        config = loaded.model.config
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

    def run_ladder(self, outliers: int, only: tuple[str, ...] = LADDER_STEPS) -> None:
        for step in ladder(outliers):
            if step.name not in only:
                continue
            count = step.scheme.outliers.count
            key = {"model": self.options.name, "step": step.name, "outliers": count}
            if self.part.has("quality-ladder", {**key, "text": self.texts[0].name}):
                continue
            with scratch(self.options.scratch) as folder:
                loaded, seconds = self.loaded(step.scheme, step.gptq, folder, step.clip)
                for text in self.texts if step.name in ("fp", "kv4") else self.texts[:1]:
                    row = {"model": self.options.name, "text": text.name, "step": step.name, "outliers": count}
                    row |= self.perplexity(loaded, text) | self.bits(loaded, step.scheme)
                    self.part.add("quality-ladder", row | self.common(seconds, step.gptq))
                del loaded

    def run_presets(self, schemes: list[Scheme]) -> None:
        full = {
            row["text"]: row["ppl"]
            for row in self.part.rows.get("quality-presets", [])
            if row["scheme"] == "bf16" and row["kv"] == "bf16"
        }
        for scheme in schemes:
            key = {"scheme": scheme.name, "kv": kv_name(scheme), "text": self.texts[0].name}
            if self.part.has("quality-presets", key):
                continue
            gptq = scheme.weight is not None and scheme.name not in ("w8a8", "fp8")
            with scratch(self.options.scratch) as folder:
                loaded, seconds = self.loaded(scheme, gptq, folder)
                row = {"model": self.options.name, "text": self.texts[0].name, "scheme": scheme.name}
                row |= {"kv": kv_name(scheme), **self.perplexity(loaded, self.texts[0])}
                full.setdefault(self.texts[0].name, row["ppl"])
                row |= {"ppl_fp": full[self.texts[0].name], **self.bits(loaded, scheme), **self.tasks(loaded)}
                self.part.add("quality-presets", row | self.common(seconds, gptq))
                del loaded
                if self.options.kernels and scheme.weight is not None:
                    self.add_kernels_row(folder, row, self.common(seconds, gptq))

    def add_kernels_row(self, folder: Path, reference: dict[str, Any], common: dict[str, Any]) -> None:
        """The same checkpoint and text through the kernels, if they run it here."""
        try:
            loaded = load(str(folder / "checkpoint"), self.options.device, "bfloat16", "auto")
        except UnsupportedError as error:
            print(f"{reference['scheme']}: not through the kernels: {error}", flush=True)
            return
        row = {key: reference[key] for key in ("model", "text", "scheme", "kv", "ppl_fp")}
        row |= {key: value for key, value in reference.items() if key.startswith("bits_")}
        self.part.add("quality-presets", row | self.perplexity(loaded, self.texts[0]) | common)

    def tasks(self, loaded: Loaded) -> dict[str, Any]:
        if not self.options.tasks:
            return {}
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
        for place, pre in (("after", False), ("before", True)):
            if self.part.has("kv-rope", {"place": place}):
                continue
            scheme = replace(PRESETS["bf16"].with_kv(PRESETS["w4a4"].kv), kv_pre_rope=pre)
            with scratch(self.options.scratch) as folder:
                loaded, _ = self.loaded(scheme, False, folder)
                row = {"model": self.options.name, "text": self.texts[0].name, "kv": kv_name(scheme), "place": place}
                row |= self.perplexity(loaded, self.texts[0])
                self.part.add("kv-rope", row | {"source": self.options.source})
                del loaded


class scratch:  # noqa: N801  a context manager, named as it reads
    """A folder that is gone afterwards, and the GPU memory of what was loaded from it as well."""

    def __init__(self, parent: Path | None) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=parent))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: exact for INT4 codes under bf16 scales
    runner = Runner(options)
    if "ladder" in options.what:
        runner.run_ladder(128, only=options.steps)
    if "presets" in options.what:
        schemes = [PRESETS["bf16"], *(s for s in PRESETS.values() if s.is_quantized)]
        extra = [PRESETS["bf16"].with_kv(PRESETS[name].kv) for name in ("w4a4", "w8a8", "fp8")]
        runner.run_presets([*schemes, *extra])
    if "kv-rope" in options.what:
        runner.run_kv_rope()
    if "scaled" in options.what:
        config, generation = read_config(options.model)
        runner.run_ladder(scaled_outliers(ModelConfig.from_hf(config, generation).hidden_size), only=("kv4",))


def join(options: Join) -> None:
    parts = [json.loads(path.read_text()) for path in options.parts]
    for name in ("quality-ladder", "quality-presets", "kv-rope"):
        rows = [row for part in parts for row in part.get(name, [])]
        if rows:
            where = dict(parts[0]["where"])
            where["command"] += f" (and {len(parts) - 1} more models alike)" if len(parts) > 1 else ""
            print("wrote", write_record(name, rows, where["machine"]["name"], commit=options.commit, where=where))


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
