"""`atom bench kernels`: every op of every scheme in microseconds, against the speed of light and what torch has.

Without a GPU it prints the bounds, and which implementation would run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..quant.presets import get_scheme
from ..quant.schemes import LinearScheme
from .activation import PERMUTE_QUANTIZE
from .bench_attention import WrongResultError, attention_rows
from .bench_config import KernelsConfig
from .bench_linear import linear_fault, linear_us
from .bench_producers import producer_bytes, producer_us
from .bounds import GPUS, linear_bound_us
from .gated import GATED_QUANTIZE
from .linear import LINEAR
from .norm import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from .paged_attention import PAGED_ATTENTION
from .registry import Op, Problem

Row = dict[str, Any]
OPS: dict[str, Op] = {
    op.name: op for op in (LINEAR, RMS_NORM_QUANTIZE, ADD_RMS_NORM_QUANTIZE, PERMUTE_QUANTIZE, GATED_QUANTIZE)
}
SHAPES = {"llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}}


def bench_kernels(config: KernelsConfig, tell: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Rows of all that was asked for, each with what runs and its bound; times are None where nothing ran.

    tell  called with what is measured next
    Raises WrongResultError if a product does not match float64, or not itself over 200 repetitions.
    """
    if config.op == "paged_attention":
        return attention_rows(GPUS[config.gpu], tell)
    rows: list[Row] = []
    for op, name, M, sizes in problems(config):
        linear = get_scheme(name).for_linear("x")
        tell(f"{op} {name} M={M} {sizes['shape']}")
        is_gemm = op == "linear"
        rows.append((_linear_row if is_gemm else _producer_row)(config, op, name, linear, M, sizes))
    return rows


def problems(config: KernelsConfig) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(op, scheme, M, sizes) of all that the options ask for."""
    for op in OPS if config.op == "all" else (config.op,):
        for name in config.scheme:
            for shape, (N, K) in SHAPES["llama-3-8b"].items():
                hidden = {"gated_quantize": "down", "permute_quantize": "o"}.get(op, "qkv")
                if op != "linear" and shape != hidden:
                    continue
                for M in config.tokens:
                    yield op, name, M, {"shape": shape, "N": N, "K": K}


def sol_score(us: float, sol_us: float, base_us: float) -> float:
    """1 at the speed of light, 0.5 at the baseline (SOL-ExecBench)."""
    if base_us <= sol_us:
        return 1.0 if us <= sol_us else 0.0
    return 1.0 / (1.0 + (us - sol_us) / (base_us - sol_us))


def runs_here(op: str, linear: LinearScheme, N: int, K: int) -> tuple[str, bool]:
    """(the implementation on an sm_90 GPU or why there is none, whether it can be measured on this machine)."""
    refusals = OPS[op].refusals(Problem("sm_90", linear, N, K))
    name = OPS[op].implementations[0].name
    if name in refusals:
        return refusals[name], False
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return name, here


def _linear_row(config: KernelsConfig, op: str, name: str, linear: LinearScheme, M: int, sizes: dict[str, Any]) -> Row:
    N, K = sizes["N"], sizes["K"]
    sol = linear_bound_us(GPUS[config.gpu], M, N, K, linear)
    runs, here = runs_here("linear", linear, N, K)
    row: Row = {"op": op, "scheme": name, **sizes, "M": M, "runs": runs, "us": None, "sol_us": sol}
    row |= {"bf16_us": None, "fp8_us": None, "peer_us": None}
    if here:
        if found := linear_fault(linear, min(M, 300), N, min(K, 4096)):
            raise WrongResultError(f"linear {name} M={M} N={N}: {found}; run pytest -m gpu tests/kernels")
        us = linear_us(linear, M, N, K)
        row |= {"us": us["ours"], "bf16_us": us.get("bf16"), "fp8_us": us.get("fp8"), "peer_us": us.get("peer")}
        moved = sol_bytes(linear, M, N, K)
        row |= {"tflops": 2e-6 * M * N * K / us["ours"], "gbps": moved / us["ours"] / 1e3}
        if us.get("bf16"):
            row["score"] = sol_score(us["ours"], sol, us["bf16"])
    return row


def _producer_row(
    config: KernelsConfig, op: str, name: str, linear: LinearScheme, M: int, sizes: dict[str, Any]
) -> Row:
    K = sizes["K"]
    moved = producer_bytes(op, linear, M, K)
    sol = moved / GPUS[config.gpu].bytes_per_s * 1e6
    runs, here = runs_here(op, linear, 0, K)
    row: Row = {"op": op, "scheme": name, "shape": sizes["shape"], "M": M, "hidden": K, "runs": runs, "us": None}
    row |= {"sol_us": sol, "gbps": None}
    if here:
        us = producer_us(op, linear, M, K)
        score = sol_score(us["ours"], sol, us["torch"])
        row |= {"us": us["ours"], "gbps": moved / us["ours"] / 1e3, "torch_us": us["torch"], "score": score}
        row |= {"l2_us": us.get("l2")}
    return row


def sol_bytes(linear: LinearScheme, M: int, N: int, K: int) -> float:
    """Bytes that a product must move: weights, activations, 16-bit outputs."""
    assert linear.weight is not None
    normal, outliers = linear.split(K)
    weight = linear.weight.bits_per_value(normal) * normal + linear.outliers.bits * outliers
    activation = 16.0 * K
    if linear.activation is not None:
        activation = linear.activation.bits_per_value(normal) * normal + linear.outliers.bits * outliers
    return (N * weight + M * activation) / 8 + 2 * M * N


def records(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of the records `gemm` and `producers`: what ran, and the sums over a layer."""
    ran = [row for row in rows if row["us"] is not None]
    keys = ("scheme", "shape", "M", "N", "K", "us", "sol_us", "bf16_us", "fp8_us", "peer_us")
    gemm = [{"model": "llama-3-8b", **{k: _short(row[k]) for k in keys}} for row in ran if row["op"] == "linear"]
    for scheme, M in dict.fromkeys((row["scheme"], row["M"]) for row in gemm):
        four = [row for row in gemm if (row["scheme"], row["M"]) == (scheme, M)]
        if len(four) == len(SHAPES["llama-3-8b"]):
            total: Row = {"model": "llama-3-8b", "scheme": scheme, "shape": "sum", "M": M, "N": 0, "K": 0}
            for key in keys[5:]:
                total[key] = None if any(row[key] is None for row in four) else _short(sum(row[key] for row in four))
            gemm.append(total)
    own = ("op", "scheme", "M", "hidden", "us", "l2_us", "gbps", "sol_us")
    producers = [{k: _short(row.get(k)) for k in own} for row in ran if row["op"] in OPS and row["op"] != "linear"]
    return {"gemm": gemm, "producers": producers}


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("op", "scheme", "shape", "M", "us", "TFLOP/s", "GB/s", "sol us", "score", "bf16 us", "fp8 us", "runs")
    keys = ("op", "scheme", "shape", "M", "us", "tflops", "gbps", "sol_us", "score", "bf16_us", "fp8_us", "runs")
    known = {implementation.name for op in (*OPS.values(), PAGED_ATTENTION) for implementation in op.implementations}
    reasons = list(dict.fromkeys(row["runs"] for row in rows if row["runs"] not in known))
    numbered = [
        {**row, "runs": row["runs"] if row["runs"] in known else f"[{reasons.index(row['runs']) + 1}]"} for row in rows
    ]
    cells = [head, *(tuple(_cell(row.get(key)) for key in keys) for row in numbered)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([*lines, *(f"[{i}] {reason}" for i, reason in enumerate(reasons, 1))])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
