"""The compiled producers, run on a CPU: their PTX in the emulator, against atom/quant.

What this cannot see: what ptxas makes of the PTX, memory order and timing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels.activation import QuantizedActivation
from atom.kernels.filled_rows import filled_rows
from atom.kernels.flashinfer_solution import dequantized
from atom.kernels.gated import gated_activation
from atom.kernels.gemm import activation_columns, takes_bf16, token_scales
from atom.kernels.norm import rms_norm
from atom.kernels.producers import QuantizingProducer
from atom.quant.mixed import fake_quantize_activation
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, RotationSpec

from .linear_schemes import linear_scheme
from .machine_code import needs_dsl
from .ptx_memory import Tensor as Argument
from .ptx_operands import as_array, bf16, ptx
from .ptx_wgmma import Columns, TensorCoreKernel

pytestmark = [pytest.mark.slow, needs_dsl]
LOW_BIT = [name for name in PRESETS if name != "bf16"]


SOURCES = [("plain", name) for name in LOW_BIT] + [
    ("norm", "w4a4-bf16"),
    ("add_norm", "nvfp4"),
    ("add_norm", "w4a4-bf16"),
    ("silu", "fp8"),
    ("silu", "w4a4-bf16"),
    ("gelu_tanh", "mxfp4"),
    ("plain", "w4a4-bf16"),
    ("norm", "w4a4"),
    ("silu", "w4a4"),
]
# one CTA a token; CTAs that stay and take a few tokens each; several for a token, which meet in a cluster if they must
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "stay": {"threads": 64, "ctas_per_sm": 1},
    "stay in runs of 2": {"threads": 32, "chunks": 2, "ctas_per_sm": 1, "stages": 3},
    "stay in runs of 4": {"threads": 32, "chunks": 4, "ctas_per_sm": 1},
    "parts": {"threads": 32, "chunks": 1, "parts": 2},
}
IN_ALL_LAYOUTS = [*SOURCES[-9:], ("plain", "w4a8"), ("plain", "w4a4")]
CASES_OF_PRODUCERS = [
    (*case, layout)
    for case in SOURCES
    for layout in (LAYOUTS if case in IN_ALL_LAYOUTS else ["one"])
    if not layout.startswith("stay") or case[0] in ("norm", "plain")
]


@pytest.mark.parametrize("source,name,layout", CASES_OF_PRODUCERS)
def test_producer(source: str, name: str, layout: str, tmp_path: Path) -> None:
    """What it hands on, read back, is the reference's; exactly so where no sum or exponential is involved."""
    check_producer(source, linear_scheme(name), LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("source,name,block", [("plain", "w4a4", 128), ("norm", "w4a4", 256), ("silu", "nvfp4", 16),
                                               ("add_norm", "w4a8", 4), ("plain", "mxfp4", 64)])  # fmt: skip
def test_rotating_producer(source: str, name: str, block: int, tmp_path: Path) -> None:
    """A block Hadamard of the normal columns, a tail shorter than a block left as it is."""
    linear = replace(get_scheme(name).for_linear("x"), rotation=RotationSpec("block_hadamard", block))
    check_producer(source, linear, {}, tmp_path, is_exact=False)


@pytest.mark.parametrize("source,name,size", [("norm", "w4a4", 32), ("silu", "w4a4", 64), ("plain", "w3a3", 32)])
def test_producer_of_turned_groups(source: str, name: str, size: int, tmp_path: Path) -> None:
    """Groups of 32 or 64 under factors, turned in blocks of as many; 456 columns leave 8 of a last block."""
    linear = replace(linear_scheme(f"{name}-g{size}"), outliers=OutlierSpec(), reorder=False)
    linear = replace(linear, rotation=RotationSpec("block_hadamard", size))
    check_producer(source, linear, {}, tmp_path, is_exact=False)


@pytest.mark.parametrize("source,name", [("norm", "w4a4-hadamard"), ("plain", "w4a4-hadamard"),
                                         ("add_norm", "w4a8-hadamard"), ("silu", "w4a8-hadamard")])  # fmt: skip
def test_producer_of_rows_that_turn_whole(source: str, name: str, tmp_path: Path) -> None:
    """The rotation's factor then waits for the rounding, with the norm's."""
    linear = get_scheme(name).for_linear("x")
    check_producer(source, linear, {}, tmp_path, K=512)


@pytest.mark.parametrize("source,name,block", [("norm", "w4a4", 32), ("plain", "w4a4", 64), ("norm", "w3a3", 64)])
def test_producer_that_turns_runs(source: str, name: str, block: int, tmp_path: Path) -> None:
    """Where CTAs stay, a thread turns 32 neighbouring columns by itself, two lanes the rest of a block of 64."""
    linear = replace(linear_scheme(f"{name}-g32"), outliers=OutlierSpec(), reorder=False)
    linear = replace(linear, rotation=RotationSpec("block_hadamard", block))
    check_producer(source, linear, LAYOUTS["stay in runs of 4"], tmp_path, K=768, is_exact=False)


@pytest.mark.parametrize("size,count,layout", [(32, 0, "one"), (64, 0, "parts"), (32, 16, "stay in runs of 4"),
                                               (64, 208, "one"), (64, 144, "stay in runs of 4")])  # fmt: skip
def test_producer_of_groups_under_factors(size: int, count: int, layout: str, tmp_path: Path) -> None:
    """Bit for bit, outliers included, whose scale covers more lanes than a group's."""
    linear = replace(linear_scheme(f"w4a4-g{size}"), outliers=OutlierSpec(count), reorder=count > 0)
    more = {"parts": 3} if layout == "parts" else {}
    check_producer("plain", linear, LAYOUTS[layout] | more, tmp_path, K=520)


@pytest.mark.parametrize("name,count", [("w4a4-bf16", 16), ("w4a4-bf16", 256), ("w4a4", 208)])
@pytest.mark.parametrize("layout", ["one", "parts", "stay in runs of 4"])
def test_producer_of_few_and_many_outliers(name: str, count: int, layout: str, tmp_path: Path) -> None:
    found = linear_scheme(name)
    linear = replace(found, outliers=replace(found.outliers, count=count))
    more = {"parts": 3} if layout == "parts" else {}
    check_producer("plain", linear, LAYOUTS[layout] | more, tmp_path, K=520)


@pytest.mark.parametrize("source,name,K,layout", [
    ("plain", "w4a4", 451, "one"), ("plain", "w4a4", 453, "stay in runs of 4"), ("silu", "w4a4", 451, "parts"),
    ("norm", "w4a8", 449, "stay"), ("add_norm", "nvfp4", 450, "one"), ("plain", "w4a16", 455, "one"),
    ("norm", "w4a4-bf16", 452, "parts"), ("gelu_tanh", "mxfp4", 454, "one"), ("norm", "fp8", 451, "one"),
])  # fmt: skip
def test_producer_of_odd_rows(source: str, name: str, K: int, layout: str, tmp_path: Path) -> None:
    """Rows that are no multiple of a chunk, filled up for the kernel, which writes zeros there."""
    more = {"parts": 3} if layout == "parts" else {}
    check_producer(source, linear_scheme(name), LAYOUTS[layout] | more, tmp_path, K=K)


def check_producer(
    source: str, linear: LinearScheme, layout: dict[str, int], folder: Path, K: int = 456, is_exact: bool | None = None
) -> None:
    from atom.kernels.producers_sm90 import compile_producer

    torch.manual_seed(0)
    M = 7
    is_gated = source in ("silu", "gelu_tanh")
    perm = torch.randperm(K) if linear.reorder and not is_gated else None
    gain = torch.rand(K) + 0.5 if "norm" in source else None
    run = QuantizingProducer(source, linear, perm, gain, 1e-5)
    x, other = torch.randn(M, K).bfloat16(), torch.randn(M, K).bfloat16()
    x[1] = 0
    x[2, 5] = 40.0
    is_bf16, units = takes_bf16(linear), activation_columns(linear, K)[2]
    columns = -(-K // 8) * 16 if is_bf16 else activation_columns(linear, K)[0]
    words = np.full((M, columns // 4), 0x7F7F7F7F, np.int32)
    kind = token_scales(linear)
    rows = 2 if linear.outliers.count else 1
    scales = np.full({"group": (units, 16), "token": (rows, M), "none": (1, 1)}[kind], np.nan, np.float32)
    config = replace(run.config(torch.bfloat16, K, strided=is_gated), **layout)
    read, read_too = filled_rows(x, config), filled_rows(other, config)  # what the kernel is given
    row = read.shape[1]
    both = as_array(torch.cat((read, read_too), 1))
    sums = np.full((M, row), 0x7FFF, np.uint16)
    held_gain, held_columns = run.in_slots(config, x.device)
    ctas = 2 if config.ctas_per_sm else M
    first: Any = Columns(both, 0, row) if is_gated else Argument(as_array(read), (1,))
    TensorCoreKernel(ptx(compile_producer, config, folder)).launch_all(
        ctas * config.parts,
        config.threads,
        [
            first,
            Columns(both, row, 2 * row) if is_gated else Argument(as_array(read_too), (1,)),
            Argument(sums, (1,)),
            Argument(as_array(held_gain)),
            Argument(as_array(held_columns)),
            Argument(words, (1,)),
            Argument(scales),
            1e-5,
        ],
        together=config.parts,
    )
    codes = (
        torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
        if is_bf16
        else torch.from_numpy(words.view(np.int8))
    )
    if is_bf16:
        assert not codes[:, K:].any(), "columns that fill up a row are zero"
    found = dequantized(QuantizedActivation(codes, torch.from_numpy(scales), len(codes)), linear, K)
    values: Any = x
    if source == "add_norm":
        values = x + other
        assert torch.equal(bf16(sums)[:, :K], values)
    if is_gated:
        values = gated_activation(x.float(), other.float(), source)  # type: ignore[arg-type]
    elif gain is not None:
        values = rms_norm(values, gain, 1e-5)
    values = values.float() if perm is None else values.float()[:, perm]
    wanted = fake_quantize_activation(values, linear)
    if linear.activation is None:
        wanted = wanted.bfloat16().float()
    assert bool(torch.isfinite(found).all()), "something was not written"
    far = (found - wanted).abs() > 1e-6 * wanted.abs()
    is_exact = source == "plain" and linear.rotation is None if is_exact is None else is_exact
    assert not far.any() if is_exact else float(far.float().mean()) < 1e-3
