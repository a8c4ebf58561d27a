"""What would run, how large it would be and how long calibration would take, before a weight is read.

Example: atom check meta-llama/Llama-3.1-8B --scheme w4a4 --gpu h200
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Column, Table

from atom.calibration.config import CalibrationConfig
from atom.calibration.distill_plan import plan_distillation
from atom.calibration.estimate import GPUS as CALIBRATION_GPUS
from atom.calibration.estimate import Estimate, estimate, estimate_distillation, measure_machine
from atom.calibration.recommended import resolve

from ..checkpoint import read_scheme
from ..errors import UnsupportedError
from ..kernels.activation import PERMUTE_QUANTIZE
from ..kernels.bounds import GPUS, Gpu, linear_bound_us
from ..kernels.gated import GATED_QUANTIZE
from ..kernels.linear import LINEAR
from ..kernels.norm import RMS_NORM_QUANTIZE
from ..kernels.paged_attention import PAGED_ATTENTION
from ..kernels.registry import Op, Problem
from ..kernels.rope_append import ROPE_APPEND_KV
from ..models.config import ModelConfig
from ..models.family import model_config
from ..models.footprint import Footprint, mean_bits, measure_footprint, source_dtype
from ..models.layout import layer_prefix
from ..models.loader import meta_model
from ..models.model import Model
from ..models.source import read_config
from ..quant.presets import get_scheme, kv_name
from ..quant.schemes import Scheme, TensorSpec
from ..quant.switches import Switches
from .console import console

PRODUCERS = {
    "attention_input": RMS_NORM_QUANTIZE,
    "mlp_input": RMS_NORM_QUANTIZE,
    "o_input": PERMUTE_QUANTIZE,
    "down_input": GATED_QUANTIZE,
}

ATTENTION = (ROPE_APPEND_KV, PAGED_ATTENTION)


@dataclass(frozen=True)
class Options:
    """Options of `atom check`."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, model directory, Atom checkpoint, GGUF file, or the alias smollm2."""

    scheme: str | None = None
    """As for atom quantize; default: the checkpoint's own, or w4a4."""

    gpu: str = "cpu"
    """Where it would run: cpu, h100 or h200."""

    calibration: Annotated[CalibrationConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CalibrationConfig)
    switches: Annotated[Switches, tyro.conf.OmitArgPrefixes] = field(default_factory=Switches)

    def __post_init__(self) -> None:
        if self.target != "cpu" and self.target not in GPUS:
            raise ValueError(f"unknown --gpu {self.gpu!r}; use cpu, {', '.join(GPUS)}")
        if self.preset is not None:
            get_scheme(self.preset)

    @property
    def target(self) -> str:
        """--gpu as the tables have it."""
        return self.gpu.lower()

    @property
    def preset(self) -> str | None:
        """The scheme's name, where it is auto that of the GPU's."""
        return None if self.scheme is None else resolve(self.scheme, None if self.target == "cpu" else self.gpu)


def run(options: Options) -> dict[str, Any]:
    """Print three tables; return the same as numbers. Raises UnsupportedError for an architecture not known here."""
    raw, generation = read_config(options.model)
    own = read_scheme(raw)
    named = get_scheme(options.preset) if options.preset else own or get_scheme("w4a4")
    scheme = options.switches.apply(named, options.calibration.gptq) if own is None else named
    config = model_config(raw, generation)
    model = meta_model(config)
    gpu = GPUS.get(options.target)
    dtype = torch.bfloat16 if gpu else torch.float32
    size = measure_footprint(model, scheme, source_dtype(config), dtype)
    full = measure_footprint(model, get_scheme("bf16"), source_dtype(config), dtype)
    machine = CALIBRATION_GPUS[options.target] if gpu else measure_machine()
    cost = estimate(model, scheme, options.calibration, machine)
    planned, why = plan_distillation(model, scheme, options.calibration, machine.memory_bytes)
    training = estimate_distillation(model, scheme, planned, machine) if planned.distill_steps else None
    ops = op_table(model, scheme, gpu)
    name = Path(options.model).name
    by_place = ", formats by place" if scheme.is_mixed else ""
    console.print(
        f"{name}: {raw['architectures'][0]}, {size.parameters / 1e6:,.1f} M parameters, scheme {scheme.name}{by_place}"
    )
    table = _size_table(model, scheme, size, full, cost, options)
    if training is not None:
        text = f"{planned.distill_steps} x {planned.distill_tokens} tokens on {options.target}"
        table.add_row(f"distillation, {text}", f"about {_time(training.seconds)}, {_bytes(training.peak_bytes)}", "")
    elif why is not None:
        table.add_row("distillation", f"left out: {why}", "")
    console.print(table)
    console.print(_ops_table(ops, gpu))
    if any(row["runs"] is None for row in ops):
        console.print("Refused ops run with --kernels reference, which is correct and slow.")
    return {
        "model": options.model,
        "architecture": raw["architectures"][0],
        "supported": True,
        "scheme": scheme.name,
        "kv": kv_name(scheme),
        "parameters": size.parameters,
        "disk_bytes": size.disk,
        "packed_bytes": size.packed,
        "dense_bytes": size.dense,
        "kv_bytes_per_token": size.kv_token,
        "calibration_seconds": round(cost.seconds, 1),
        "calibration_peak_bytes": cost.peak_bytes,
        "distill_steps": planned.distill_steps,
        "distill_seconds": None if training is None else round(training.seconds, 1),
        "distill_peak_bytes": None if training is None else training.peak_bytes,
        "ops": ops,
    }


def op_table(model: Model, scheme: Scheme, gpu: Gpu | None) -> list[dict[str, Any]]:
    """One entry for each op of a decoder layer: what runs it there, or why nothing does, and its bound.

    Where layers differ, an entry for each format, which says in how many layers it is.
    """
    layer = next(model.model.decoder_layers())
    rows: list[dict[str, Any]] = []
    arch = gpu.arch if gpu else "cpu"
    layers = range(model.config.num_layers)
    for group in model.family.groups:
        shapes = [tuple(layer.get_parameter(f"{n}.weight").shape) for n in group.linears]
        K, N = shapes[0][1], sum(shape[0] for shape in shapes)
        formats = Counter(scheme.for_linear(f"{layer_prefix(index)}.{group.linears[0]}") for index in layers)
        for linear, count in formats.most_common():
            of = "" if len(formats) == 1 else f", {linear.label} ({count} of {len(layers)} layers)"
            if linear.weight is None:
                where = ", ".join(group.linears) + of
                rows.append({"op": "linear", "where": where, "runs": "torch", "why": "full precision"})
                continue
            rows.append(_row(PRODUCERS[group.name], group.name + of, Problem(arch, linear, K=K)))
            names = " + ".join(n.rpartition(".")[2] for n in group.linears)
            row = _row(LINEAR, names + of, Problem(arch, linear, N, K))
            if gpu:
                row["bound_us"] = {M: round(linear_bound_us(gpu, M, N, K, linear), 2) for M in (1, 64, 2048)}
            rows.append(row)
    caches = Counter(scheme.kv_of(index) for index in layers)
    for kv, count in caches.most_common():
        of = "" if kv is None or len(caches) == 1 else f", {kv.format} ({count} of {len(layers)} layers)"
        rows += [_row(op, f"KV cache{of}", _attention_problem(arch, model.config, scheme, kv)) for op in ATTENTION]
    return rows


def _attention_problem(arch: str, config: ModelConfig, scheme: Scheme, kv: TensorSpec | None) -> Problem:
    return Problem(
        arch,
        kv=kv,
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        kv_pre_rope=kv is not None and scheme.kv_pre_rope,
        kv_centred=scheme.stores_key_centre,
        kv_rotates=scheme.rotates_keys,
        kv_recent=scheme.kv_recent,
    )


def _row(op: Op, where: str, problem: Problem) -> dict[str, Any]:
    refusals = op.refusals(problem)
    try:
        runs = op.choose(problem).name
    except UnsupportedError:
        runs = None
    why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    return {"op": op.name, "where": where, "runs": runs, "why": why or ("" if runs else "no kernel for it yet")}


def _size_table(
    model: Model, scheme: Scheme, size: Footprint, full: Footprint, cost: Estimate, options: Options
) -> Table:
    K, kv_bits = model.config.hidden_size, scheme.kv_bits(model.config.head_dim, model.config.num_layers)
    table = Table("", "this scheme", "16 bits")
    bits, where = (scheme.weight_bits(K), scheme.activation_bits(K)), ""
    if scheme.overrides:
        bits, where = mean_bits(model, scheme), ", mean"
    for what, of in zip(("weights", "activations"), bits, strict=True):
        table.add_row(f"effective bits: {what}{where}", f"{of:.2f}", "16")
    table.add_row(f"effective bits: KV ({kv_name(scheme)})", f"{kv_bits:.2f}", "16")
    table.add_row("checkpoint on disk", _bytes(size.disk), _bytes(full.disk))
    table.add_row("weights in memory, packed for kernels", _bytes(size.packed), _bytes(full.packed))
    table.add_row("weights in memory, float32 reference", _bytes(size.dense), _bytes(full.dense))
    table.add_row("KV cache a token", _bytes(size.kv_token), _bytes(size.kv_token_16))
    text = f"{options.calibration.windows} x {options.calibration.window_length} tokens on {options.target}"
    table.add_row(f"calibration, {text}", f"about {_time(cost.seconds)}, {_bytes(cost.peak_bytes)}", "")
    return table


def _ops_table(ops: list[dict[str, Any]], gpu: Gpu | None) -> Table:
    bounds = ["M=1", "M=64", "M=2048"] if gpu else []
    names = ("op", "where", "runs on " + (gpu.name if gpu else "cpu"))
    table = Table(*(Column(name, overflow="fold") for name in names), *bounds, pad_edge=False)
    table.caption = "M: the least microseconds that M tokens can take, from bytes and operations" if gpu else None
    for row in ops:
        runs = row["runs"] or f"refused ({row['why']})"
        bound = [str(v) for v in row.get("bound_us", {}).values()] or [""] * len(bounds)
        table.add_row(row["op"], row["where"], runs, *bound)
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
