"""The throughput goals of the project, what bytes and operations allow of each, and what was measured.

A goal is an absolute rate, or a ratio of two schemes in the same memory, under the same TPOT target, each at its own
best batch (or both at an equal one).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from atom.kernels.bounds import Gpu
from atom.quant.presets import get_scheme, kv_name

from .floor import GIB, Bound, Mix, model_floor
from .lengths import Paper, parse_workload

GPU_MEMORY_GIB = {"h200": 139.8, "h100": 79.1}  # as torch reports them
SAMPLE = 4096  # requests over which a distribution's lengths are averaged
NO_TARGET_MS = 1e9


@dataclass(frozen=True)
class Case:
    """One experiment's setting.

    memory_gb   GiB for all; 0 is the whole GPU
    tpot_ms     target for the time per output token; None: none
    batch       an equal batch for all schemes; None: each one's best
    reserve_gb  GiB of the memory that neither weights nor cache get: activations, the GPU's context
    """

    experiment: str
    shape: str
    workload: str
    memory_gb: int = 0
    tpot_ms: float | None = None
    batch: int | None = None
    reserve_gb: float = 0.0

    def memory_bytes(self, gpu: Gpu) -> float:
        return ((self.memory_gb or GPU_MEMORY_GIB[gpu.name]) - self.reserve_gb) * GIB

    def bound(self, scheme: str, gpu: Gpu) -> Bound | None:
        """What is possible here under `scheme`; None if nothing is: too little memory, or a target below a step."""
        floor, mix, target = model_floor(self.shape, scheme, gpu), _mix(self.workload), self.tpot_ms or NO_TARGET_MS
        if self.batch is None:
            return floor.best(mix, self.memory_bytes(gpu), target)
        found = floor.bound(mix, self.batch)
        fits = self.batch <= floor.max_batch(self.memory_bytes(gpu), found.context)
        return found if fits and found.tpot_ms <= target else None

    def row(self, scheme: str, gpu: Gpu) -> dict[str, Any]:
        """The bound as a row with the keys of record `throughput`, and `weight_gb`, `kv_gb`, `step_ms` beside them."""
        bound, mix = self.bound(scheme, gpu), _mix(self.workload)
        return {
            **self.key(scheme),
            "batch": self.batch if bound is None else bound.batch,
            "input": round(float(mix.prompts.mean())),
            "output": round(mix.outputs / len(mix.prompts)),
            "out_tok_s": None if bound is None else round(bound.out_tok_s, 1),
            "tpot_ms": None if bound is None else round(bound.tpot_ms, 3),
            "step_ms": None if bound is None else round(bound.step_ms, 3),
            "weight_gb": None if bound is None else round(bound.weight_bytes / 1e9, 2),
            "kv_gb": None if bound is None else round(bound.kv_bytes / 1e9, 2),
        }

    def key(self, scheme: str) -> dict[str, Any]:
        """What identifies a row of record `throughput` here, whatever was measured (`batch` too where it is equal)."""
        spec = get_scheme(scheme)
        found = {
            "experiment": self.experiment,
            "shape": self.shape,
            "scheme": spec.name,
            "kv": kv_name(spec),
            "memory_gb": self.memory_gb,
            "tpot_target_ms": self.tpot_ms,
            "batch_mode": "best" if self.batch is None else "equal",
        }
        return found | ({} if self.batch is None else {"batch": self.batch}) | self.lengths_key()

    def lengths_key(self) -> dict[str, Any]:
        """Input and output where they are fixed; a paper case's are the distribution's means."""
        prompt, _, output = self.workload.partition("/")
        return {"input": int(prompt), "output": int(output)} if prompt.isdigit() and output.isdigit() else {}

    def row_of(self, scheme: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The row of record `throughput` for this case, or None if it was not measured."""
        key = self.key(scheme)
        for row in rows:
            if all(row.get(name) == value for name, value in key.items()) and _same_workload(row, self.workload):
                return row
        return None

    def measured(self, scheme: str, rows: Sequence[dict[str, Any]]) -> float | None:
        """Output tok/s of that row."""
        row = self.row_of(scheme, rows)
        return None if row is None or row["out_tok_s"] is None else float(row["out_tok_s"])


@lru_cache(maxsize=32)
def _mix(workload: str) -> Mix:
    count = None if workload.startswith(("trace:", "turns:")) else SAMPLE
    return Mix.of(parse_workload(workload).items(count, 0))


def _same_workload(row: dict[str, Any], workload: str) -> bool:
    """Rows of one experiment with several length distributions say theirs under `workload`."""
    return "workload" not in row or row["workload"] == workload


@dataclass(frozen=True)
class Goal:
    """`scheme` reaches `wanted` output tok/s in `case`, or `wanted` times what `over` reaches there."""

    case: Case
    scheme: str
    wanted: float
    over: str | None = None

    @property
    def text(self) -> str:
        memory = f"{self.case.memory_gb} GiB" if self.case.memory_gb else "whole GPU"
        target = "" if self.case.tpot_ms is None else f", TPOT {self.case.tpot_ms:g} ms"
        what = f"{self.scheme} over {self.over}" if self.over else f"{self.scheme} tok/s"
        return f"{what}: {self.case.shape}, {self.case.workload}, {memory}{target}"

    def allowed(self, gpu: Gpu) -> float | None:
        """The same figure of the bounds; None if a side cannot run at all."""
        bound = self.case.bound(self.scheme, gpu)
        if bound is None or self.over is None:
            return None if bound is None else bound.out_tok_s
        other = self.case.bound(self.over, gpu)
        return None if other is None else bound.out_tok_s / other.out_tok_s

    def measured(self, rows: Sequence[dict[str, Any]]) -> float | None:
        """The same figure of measured rows; None where one is missing."""
        value = self.case.measured(self.scheme, rows)
        if value is None or self.over is None:
            return value
        other = self.case.measured(self.over, rows)
        return value / other if other else None


def paper_case(tpot_ms: float, workload: str = f"paper:{Paper().limit}", batch: int | None = None) -> Case:
    """The paper's experiment: Llama-2-7B's shape in 24 GiB."""
    return Case("paper", "llama-2-7b", workload, 24, tpot_ms, batch)


def offline_case(lengths: str, memory_gb: int = 0) -> Case:
    """Today's experiment: Llama-3-8B's shape, all requests at once."""
    return Case("offline", "llama-3-8b", lengths, memory_gb)


GOALS = (
    *(
        goal
        for target in (100.0, 5.0)
        for goal in (
            Goal(paper_case(target), "w4a4", 7.73, "bf16"),
            Goal(paper_case(target), "w4a4", 2.53, "w8a8+kv16"),
            Goal(paper_case(target), "w4a4", 2.1, "w8a8"),
        )
    ),
    Goal(offline_case("512/256"), "w4a8", 20_000),
    Goal(offline_case("512/256", 24), "w4a8", 19_000),
    Goal(offline_case("1000/1000"), "w4a8", 1.25, "fp8"),
    Goal(offline_case("20000/2000"), "w4a8", 1.3, "fp8"),
    Goal(offline_case("1000/1000"), "w4a8", 17_744),
    Goal(offline_case("20000/2000"), "w4a8", 1_804),
)
