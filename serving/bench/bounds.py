"""`atom bench bounds`: what bytes and operations allow, next to what was measured, and the goals next to both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from atom.kernels.bounds import GPUS
from atom.quant.presets import get_scheme
from atom.records import read_record

from .goals import GOALS, GPU_MEMORY_GIB, Case
from .lengths import parse_workload
from .shapes import read_shape
from .tables import text_table

SCHEMES = ("bf16", "w8a8+kv16", "w8a8", "fp8", "w4a16", "w4a8", "w4a4")


@dataclass(frozen=True)
class BoundsConfig:
    """The most that a GPU allows: batch, step time and tokens a second of a shape under each scheme.

    Example: atom bench bounds --shape llama-3-8b --workload 1000/1000 --memory-gb 0 24
    """

    shape: str = "llama-2-7b"
    """llama-2-7b, llama-2-13b, llama-3-8b, llama-3-70b, a config.json, or a model's directory."""

    workload: str = "paper"
    """Lengths, as for atom bench serve."""

    schemes: tuple[str, ...] = SCHEMES
    """Presets, with +kv4, +kv8, +kvfp8 or +kv16 for another cache."""

    memory_gb: tuple[int, ...] = (24,)
    """GiB for weights and KV cache; 0 is the whole GPU."""

    tpot_ms: tuple[float, ...] = (100.0, 5.0)
    """Targets for the time per output token, each with the best batch; none at all: --tpot-ms 0."""

    batches: tuple[int, ...] = (8, 32, 64, 128)
    """Equal batches to compare at, in the memory of the whole GPU."""

    reserve_gb: float = 0.0
    """GiB of the memory that neither weights nor cache get: activations, the GPU's context. Real engines need some."""

    gpu: str = "h200"
    """h200 or h100."""

    goals: bool = True
    """Also the project's goals."""

    def __post_init__(self) -> None:
        read_shape(self.shape)
        if not self.workload.startswith(("trace:", "turns:")):
            parse_workload(self.workload)
        for scheme in self.schemes:
            get_scheme(scheme)
        if self.gpu not in GPUS or self.gpu not in GPU_MEMORY_GIB:
            raise ValueError(f"unknown --gpu {self.gpu!r}; use one of {', '.join(GPU_MEMORY_GIB)}")
        if any(batch < 1 for batch in self.batches) or min(*self.memory_gb, self.reserve_gb) < 0:
            raise ValueError("batches are at least 1 and memory at least 0 GiB; 0 is the whole GPU")

    def cases(self) -> list[Case]:
        """Best batches under each target, then equal batches."""
        name = "paper" if self.workload.startswith("paper") else "offline"
        workload = "paper:2048" if self.workload == "paper" else self.workload
        found = []
        for memory in self.memory_gb:
            for target in self.tpot_ms:
                found.append(Case(name, self.shape, workload, memory, target or None, None, self.reserve_gb))
        return found + [Case(name, self.shape, workload, 0, None, b, self.reserve_gb) for b in self.batches]


def measured_rows(gpu: str) -> list[dict[str, Any]]:
    """The rows of record `throughput`, none if it was not measured yet."""
    try:
        return read_record("throughput", gpu).rows
    except FileNotFoundError:
        return []


def bound_rows(config: BoundsConfig, measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case under every scheme; `ratio` is to the first scheme, `measured` and `share` where there is a record."""
    rows: list[dict[str, Any]] = []
    first: float | None = None
    for case in config.cases():
        for scheme in config.schemes:
            row = case.row(scheme, GPUS[config.gpu])
            rate = row["out_tok_s"]
            first = rate if scheme == config.schemes[0] else first
            found = case.measured(scheme, measured)
            row |= {"ratio": None if rate is None or not first else round(rate / first, 3), "measured": found}
            row["share"] = None if found is None or rate is None else round(found / rate, 3)
            rows.append(row)
    return rows


def goal_rows(gpu: str, measured: Sequence[dict[str, Any]], reserve_gb: float = 0.0) -> list[dict[str, Any]]:
    """Each goal: what is wanted, what the GPU allows, what was measured.

    `reachable` is whether the bound allows it. A ratio beyond that of two bounds can only be had over a baseline that
    is further from its own.
    """
    rows = []
    for each in GOALS:
        goal = replace(each, case=replace(each.case, reserve_gb=reserve_gb))
        allowed, found = goal.allowed(GPUS[gpu]), goal.measured(measured)
        rows.append(
            {
                "goal": goal.text,
                "wanted": goal.wanted,
                "allowed": None if allowed is None else round(allowed, 2),
                "reachable": allowed is not None and allowed >= goal.wanted,
                "measured": None if found is None else round(found, 2),
                "is_ratio": goal.over is not None,
            }
        )
    return rows


def bounds_table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    keys = ("batch", "weight_gb", "kv_gb", "step_ms", "tpot_ms", "out_tok_s", "ratio", "measured", "share")
    titles = ["scheme", "kv", "memory", "TPOT target", "batch", "weights GB", "KV GB", "step ms", "TPOT ms"]
    titles += ["out tok/s", "ratio", "measured", "share"]
    body = []
    for row in rows:
        memory = f"{row['memory_gb']} GiB" if row["memory_gb"] else "whole GPU"
        if row["batch_mode"] == "equal":
            target = "equal batch"
        else:
            target = "none" if row["tpot_target_ms"] is None else f"{row['tpot_target_ms']:g} ms"
        values = [row[key] for key in keys]
        if row["out_tok_s"] is None:
            values[1] = "does not fit" if row["batch_mode"] == "equal" else "no batch"
        body.append([row["scheme"], row["kv"], memory, target, *(cell if cell is not None else "" for cell in values)])
    return text_table(titles, body)


def goals_table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    titles = ("goal", "wanted", "GPU allows", "measured", "")
    body = []
    for row in rows:
        beyond = "beyond both at their bounds" if row["is_ratio"] else "beyond the GPU"
        body.append(
            [row["goal"], float(row["wanted"]), row["allowed"], row["measured"], "" if row["reachable"] else beyond]
        )
    return text_table(titles, body)
