"""`atom bench kernels` without a GPU: bounds, what would run, records; its random operands through emulated kernels."""

from pathlib import Path

import pytest
import torch

from atom.kernels.activation import QuantizedActivation
from atom.kernels.bench import bench_kernels, records, sol_score, table
from atom.kernels.bench_config import KernelsConfig
from atom.kernels.bench_linear import fault, tolerance
from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.bench_producers import make_producer, producer_bytes, reference
from atom.kernels.gemm import Gemm, pack_weight, token_scales
from atom.kernels.producers import AddingProducer
from atom.quant.presets import PRESETS, get_scheme
from atom.records import SCHEMAS

from .emulated import EmulatedGpu
from .test_warm import needs_dsl

LOW_BIT = [name for name in PRESETS if name != "bf16"]


@needs_dsl
@pytest.mark.parametrize("name", LOW_BIT)
def test_operands_mean_what_the_gemm_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before a measurement passes on right numbers, and fails when one row has other weights."""
    EmulatedGpu(monkeypatch)
    linear = get_scheme(name).for_linear("x")
    weight, x = random_weight(linear, 72, 320, "cpu"), random_activation(linear, 5, 320, "cpu")
    gemm = Gemm(pack_weight(linear, weight), token_scales(linear))
    expected = product(x, weight, linear)
    assert fault(gemm, x.codes, x.scales, expected, tolerance(linear), 2) is None
    weight.normal.codes.view(torch.uint8)[0] ^= 7
    wrong = product(x, weight, linear)
    assert "elements are wrong" in str(fault(gemm, x.codes, x.scales, wrong, tolerance(linear), 2))


def test_a_product_that_differs_between_runs_is_found() -> None:
    calls: list[int] = []

    def run(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full((2, 2), float(len(calls) > 3)).bfloat16()

    found = fault(run, torch.empty(0), torch.empty(0), torch.zeros(2, 2, dtype=torch.float64), 1e-5, 10)
    assert found == "differs between runs"


def test_rows_without_a_gpu_say_what_would_run() -> None:
    rows = bench_kernels(KernelsConfig(scheme=("w8a8", "fp8"), tokens=(1, 8192)))
    linear = {(row["scheme"], row["shape"], row["M"]): row for row in rows if row["op"] == "linear"}
    assert len(linear) == 16 and len(rows) == 32
    assert linear["w8a8", "qkv", 1]["runs"] == linear["fp8", "qkv", 1]["runs"] == "gemm_sm90"
    # 6144 x 4096 weights, 6144 scales of 4 bytes, 4096 codes and 6144 bfloat16 at 4.38 TB/s; then operations decide
    assert linear["w8a8", "qkv", 1]["sol_us"] == pytest.approx(5.755, abs=0.002)
    assert linear["w8a8", "qkv", 8192]["sol_us"] == pytest.approx(2 * 8192 * 6144 * 4096 / 1656e6, rel=1e-6)
    assert all(row["us"] is None for row in rows)
    assert "gemm_sm90" in table(rows)


def test_bytes_of_a_producer() -> None:
    w4a8 = get_scheme("w4a8").for_linear("x")
    assert producer_bytes("rms_norm_quantize", w4a8, 3, 4096) == 3 * (8192 + 4096 + 4)
    assert producer_bytes("add_rms_norm_quantize", w4a8, 3, 4096) == 3 * (3 * 8192 + 4096 + 4)
    w4a16 = get_scheme("w4a16").for_linear("x")
    assert producer_bytes("gated_quantize", w4a16, 1, 4096) == 3 * 8192


def test_score() -> None:
    assert sol_score(10, 10, 50) == 1.0 and sol_score(50, 10, 50) == 0.5 and sol_score(30, 10, 50) > 0.66
    assert sol_score(10, 20, 15) == 1.0 and sol_score(25, 20, 15) == 0.0


def test_records_hold_what_ran_and_the_sum_of_a_layer() -> None:
    rows = bench_kernels(KernelsConfig(scheme=("w4a8",), tokens=(1,)))
    for row in rows:
        row |= {"us": 2.0, "gbps": 1.0}
        if row["op"] == "linear":
            row |= {"bf16_us": 4.0, "fp8_us": None}
    rows[-1]["us"] = None
    found = records(rows)
    assert [row["shape"] for row in found["gemm"]] == ["qkv", "o", "gate_up", "down", "sum"]
    total = found["gemm"][-1]
    assert total["us"] == 8.0 and total["bf16_us"] == 16.0 and total["fp8_us"] is None and len(found["producers"]) == 3
    for name, records_rows in found.items():
        for row in records_rows:
            SCHEMAS[name].check(row, name)


@pytest.mark.parametrize("op", ["rms_norm_quantize", "add_rms_norm_quantize", "permute_quantize", "gated_quantize"])
@needs_dsl
def test_the_torch_baseline_is_the_same_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a producer is timed against computes what the producer computes."""
    EmulatedGpu(monkeypatch)
    linear = get_scheme("mxfp4").for_linear("x")
    run = make_producer(op, linear, 256, "cpu")
    x = [torch.randn(4, 256).bfloat16() for _ in range(1 if op in ("rms_norm_quantize", "permute_quantize") else 2)]
    wanted = reference(op, linear, run)(*(t.clone() for t in x))
    wanted = wanted[1] if op == "add_rms_norm_quantize" else wanted
    found = AddingProducer(run)(*x)[1] if op == "add_rms_norm_quantize" else run(*x)
    assert isinstance(found, QuantizedActivation)
    assert float((found.packed.float() != wanted).float().mean()) < 0.02


@pytest.mark.parametrize(
    "options,words",
    [({"gpu": "b200"}, "h200"), ({"scheme": ("bf16",)}, "no low-bit kernels"), ({"tokens": (0,)}, "at least 1")],
)
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KernelsConfig(**options)  # type: ignore[arg-type]


def test_the_command_prints_and_ends_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from atom.cli import main

    assert main(["bench", "kernels", "--op", "linear", "--scheme", "w4a8", "--tokens", "1", "--json"]) in (0, None)
    assert '"gemm_sm90"' in capsys.readouterr().out.splitlines()[-1]
