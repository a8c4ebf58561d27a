"""Ways to quantize weights and activations, compared under one protocol, as the record accuracy-frontier.

    python benchmarks/accuracy_frontier.py measure MODEL --name NAME --calib train.txt --text test.txt --output OUT.json
    python benchmarks/accuracy_frontier.py join part1.json part2.json ... --machine h200

The methods are those of atom.calibration.methods. Each writes a checkpoint, which is loaded and run on the reference
path, as in quality.py; `flatquant` alone runs in memory. A part is rewritten after every method, so that a stopped run
loses one of them; `join` writes the record.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import tyro
from quality import Part, scratch

from atom.calibration.config import CalibrationConfig
from atom.calibration.data import load_windows
from atom.calibration.distill import load_distill_text
from atom.calibration.flatquant import FlatConfig, flatten_model
from atom.calibration.methods import Bits, Method, methods, with_cache
from atom.calibration.stream import quantize_and_distill, quantize_source
from atom.errors import UnsupportedError
from atom.eval.load import Loaded, load
from atom.eval.perplexity import measure_perplexity
from atom.eval.texts import load_text
from atom.models.source import load_tokenizer, open_source
from atom.quant.presets import get_scheme, kv_name
from atom.quant.schemes import Scheme
from atom.records import write_record

RECORD = "accuracy-frontier"


@dataclass(frozen=True)
class Measure:
    """Measure one model."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory, GGUF file or hub id of the full-precision model."""

    name: str
    """What the record calls it."""

    output: Path
    """The part to write; what it holds already is kept and not measured again."""

    calib: str = "wikitext2"
    """Calibration text, disjoint from the test texts."""

    text: tuple[str, ...] = ("wikitext2",)
    """Test texts; the first is for every method, the others for `fp`, `atom` and `ours`."""

    schemes: tuple[Bits, ...] = get_args(Bits)
    """w4a4, w4a8."""

    methods: tuple[str, ...] = tuple(methods("w4a4"))
    """Which methods, in this order."""

    kv: str = "kv4"
    """The cache of all methods: kv4, kv8, kvfp8 or kv16."""

    windows: int = 128
    """Calibration windows."""

    window_length: int = 2048
    """Tokens of a calibration window."""

    batch_tokens: int = 8192
    """Tokens that run at once in calibration, and make a step of distillation."""

    distill_seconds: float = 600.0
    """At most so long for the distillation of `ours`."""

    flat_steps: int = 60
    """Training steps of each layer for flatquant."""

    eval_window: int = 2048
    """Tokens of a test window."""

    limit: int | None = None
    """Test windows of each text."""

    device: str = "auto"
    """cpu or cuda."""

    machine: str = "cpu"
    """What the record calls the machine: h200 or cpu."""

    source: str = ""
    """Where the weights come from (a GGUF's format, say); stands beside every number."""

    scratch: Path | None = None
    """Where checkpoints are written and removed again."""


@dataclass(frozen=True)
class Join:
    """Write the record from parts."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What measure wrote."""

    commit: str | None = None
    """The commit that was measured; default: the checkout's."""


class Runner:
    """Measures one method after another of one model."""

    def __init__(self, options: Measure) -> None:
        self.options = options
        self.part = Part.open(options.output, options.machine)
        self.texts = [load_text(name) for name in options.text]
        self.source = open_source(options.model)
        self.base = CalibrationConfig(
            calib=options.calib,
            windows=options.windows,
            window_length=options.window_length,
            device=options.device,
            distill_seconds=options.distill_seconds,
            batch_tokens=options.batch_tokens,
        )
        self.tokenizer = load_tokenizer(self.source.path)
        self.windows = load_windows(
            options.calib, self.tokenizer, options.windows, options.window_length, self.base.seed
        )
        self.distilled = ""
        self.is_full = False
        self.full: dict[str, float] = {
            row["text"]: row["ppl"] for row in self.part.rows.get(RECORD, []) if row["method"] == "fp"
        }

    def run(self, method: Method, bits: Bits) -> None:
        key = {"method": method.name, "scheme": bits, "text": self.texts[0].name}
        if self.part.has(RECORD, key if method.name != "fp" else {"method": "fp"}):
            return
        scheme = method.scheme if method.name == "fp" else with_cache(method.scheme, self.options.kv)
        started = time.perf_counter()
        with scratch(self.options.scratch) as folder:
            loaded = self.loaded(method, scheme, folder)
            seconds = time.perf_counter() - started
            for text in self.texts if method.name in ("fp", "atom", "ours") else self.texts[:1]:
                row = {"model": self.options.name, "text": text.name, "method": method.name, "scheme": bits}
                row |= {"kv": kv_name(scheme), **self.perplexity(loaded, text), **self.bits(loaded, scheme)}
                row |= {"source": self.options.source, "seconds": round(seconds, 1)}
                row |= {} if method.name == "fp" else {"calibration": self.calibration(method)}
                if method.learned:
                    row["note"] = "run in memory: its transforms have no place in a checkpoint"
                self.part.add(RECORD, row)
            del loaded

    def loaded(self, method: Method, scheme: Scheme, folder: Path) -> Loaded:
        """The model as `method` quantizes it."""
        self.distilled, self.is_full = "", method.name == "fp"
        where, device = str(self.source.path), self.options.device
        if not scheme.is_quantized:
            return load(where, device, "float32", "reference")
        if method.learned:
            cached = with_cache(get_scheme("bf16"), self.options.kv)
            if cached.is_quantized:  # keys prepared for the cache, weights as they are
                where = str(folder / "cached")
                quantize_source(self.source, cached, folder / "cached", self.base, self.windows)
            loaded = load(where, device, "float32", "reference")
            bits = 8 if scheme.activation is None or scheme.activation.format == "int8" else 4
            settings = FlatConfig(activation_bits=bits, steps=self.options.flat_steps)
            flatten_model(loaded.model, self.windows.tokens[:64], cached, settings)
            return loaded
        config, out = method.config(self.base), folder / "checkpoint"
        if config.distill_steps:
            text = load_distill_text(self.tokenizer, config, self.windows)
            found = quantize_and_distill(self.source, scheme, out, config, self.windows, text).distilled
            assert found is not None
            self.distilled = "distilled in {steps} steps, {tokens} tokens, {seconds} s".format(**found)
        else:
            quantize_source(self.source, scheme, out, config, self.windows)
        return load(str(out), device, "float32", "reference")

    def calibration(self, method: Method) -> str:
        how = f"{self.options.windows} x {self.options.window_length} of {Path(self.options.calib).name}"
        return how + (f", {self.distilled}" if self.distilled else "")

    def perplexity(self, loaded: Loaded, text: Any) -> dict[str, Any]:
        """The row's measurements; a perplexity beyond all sense is written as 1e9, which JSON can hold."""
        found = measure_perplexity(
            loaded.model, loaded.tokenizer, text, window=self.options.eval_window, limit=self.options.limit
        )
        ppl = round(found.perplexity, 4) if math.isfinite(found.perplexity) else 1e9
        if self.is_full:
            self.full[text.name] = ppl
        return {
            "ppl": ppl,
            "ppl_fp": self.full.get(text.name),
            "windows": found.windows,
            "window": found.window,
            "path": "reference",
        }

    def bits(self, loaded: Loaded, scheme: Scheme) -> dict[str, float]:
        config = loaded.model.config
        return {
            "bits_weight": round(scheme.weight_bits(config.hidden_size), 3),
            "bits_activation": round(scheme.activation_bits(config.hidden_size), 3),
            "bits_kv": round(scheme.kv_bits(config.head_dim), 3),
        }


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: exact for INT4 codes under bf16 scales
    runner = Runner(options)
    for bits in options.schemes:
        known = methods(bits)
        for name in options.methods:
            if name not in known:
                continue
            try:
                runner.run(known[name], bits)
            except UnsupportedError as error:
                print(f"{options.name}, {bits}: no {name}: {error}", flush=True)


def join(options: Join) -> None:
    parts = [json.loads(path.read_text()) for path in options.parts]
    rows = [row for part in parts for row in part.get(RECORD, [])]
    full = {(row["model"], row["text"]): row["ppl"] for row in rows if row["method"] == "fp"}
    for row in rows:  # a part that was measured beside the one with full precision does not know it
        row["ppl_fp"] = full[row["model"], row["text"]]
    where = dict(parts[0]["where"])
    where["command"] += f" (and {len(parts) - 1} more models alike)" if len(parts) > 1 else ""
    print("wrote", write_record(RECORD, rows, where["machine"]["name"], commit=options.commit, where=where))


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
