"""Blackwell's block-scaled GEMMs: operand layouts, machine code for both architectures, sm_120a's PTX emulated."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.kernels import fp4_layout, gemm_fp4
from atom.kernels.activation import PERMUTE_QUANTIZE
from atom.kernels.fp4_config import Fp4Config
from atom.kernels.gated import GATED_QUANTIZE
from atom.kernels.gemm_fp4 import quantize_fp4
from atom.kernels.linear import LINEAR
from atom.kernels.norm import RMS_NORM_QUANTIZE
from atom.kernels.registry import Problem
from atom.quant.formats import get_format
from atom.quant.mixed import fake_quantize_activation, quantize_weight
from atom.quant.presets import get_scheme
from atom.quant.rounding import code_values

from .machine_code import disassemble, needs_dsl
from .ptx_emulator import Kernel
from .ptx_memory import Tensor as Argument


def random_operand(rows: int, K: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [rows, K], scales [rows, groups], what they stand for float64 [rows, K])."""
    codes = torch.randint(0, 16, (rows, K), dtype=torch.uint8)
    shape = (rows, -(-K // group_size))
    scale = torch.exp2(torch.randint(-6, 6, shape).float())
    if group_size == 16:
        scale = (torch.rand(shape) * 400 + 0.01).to(torch.float8_e4m3fn).float()
    values = code_values(codes, get_format("e2m1")).double()
    return codes, scale, values * scale.double().repeat_interleave(group_size, 1)[:, :K]


@pytest.mark.parametrize("rows,K,group_size", [(1, 64, 16), (130, 200, 16), (300, 520, 32)])
def test_every_scale_has_a_place_of_its_own(rows: int, K: int, group_size: int) -> None:
    """128 rows x 4 scales a tile; rows 32 apart are neighbours, tiles follow along K."""
    tiles = fp4_layout.scale_tiles(K, group_size)
    groups = -(-K // group_size)
    row, group = torch.arange(rows).unsqueeze(1), torch.arange(groups)
    index = fp4_layout.scale_index(row, group, tiles)
    assert index.unique().numel() == rows * groups
    size = fp4_layout.pack_scales(torch.ones(rows, groups), K, group_size).numel()
    assert int(index.max()) < size == -(-rows // 128) * tiles * 512
    at = fp4_layout.scale_index(torch.tensor(97), torch.tensor(6), 3)
    assert int(at) == 512 + 16 * 1 + 4 * 3 + 2


def test_scales_are_bytes_of_their_format() -> None:
    e4m3 = fp4_layout.pack_scales(torch.tensor([[1.0, 448.0]]), 32, 16)
    assert e4m3[:4].tolist() == [0x38, 0x7E, 0, 0]
    e8m0 = fp4_layout.pack_scales(torch.tensor([[1.0, 2.0**-127, 2.0**100]]), 96, 32)
    assert e8m0[:4].tolist() == [127, 0, 227, 0]


def test_fragments_hold_what_mma_asks_for() -> None:
    """Register i of lane 4 g + q: row g + 8 (i % 2), columns from 8 q + 32 (i // 2) on, low nibble first."""
    codes = torch.randint(0, 16, (40, 256), dtype=torch.uint8)
    words = fp4_layout.fragment_order(fp4_layout.pack_codes(codes))
    assert words.shape == (3, 4, 32, 4)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, 8))
    for tile, step, lane, i in ((0, 0, 0, 0), (1, 3, 13, 1), (2, 2, 31, 3), (2, 1, 6, 2)):
        word = int(words[tile, step, lane, i]) & 0xFFFFFFFF
        row, column = 16 * tile + lane // 4 + 8 * (i % 2), 64 * step + 8 * (lane % 4) + 32 * (i // 2)
        assert [(word >> 4 * e) & 15 for e in range(8)] == padded[row, column : column + 8].tolist()


def as_words(packed: Tensor) -> np.ndarray:
    return packed.contiguous().view(torch.int32).numpy().view(np.uint32)


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize(
    "group_size,M,N,K,bias", [(16, 3, 72, 200, True), (16, 70, 140, 128, False), (32, 9, 33, 328, True)]
)
def test_sm120_in_the_emulator(group_size: int, M: int, N: int, K: int, bias: bool, tmp_path: Path) -> None:
    """Every element against float64, with features, tokens and columns that do not fill a tile."""
    torch.manual_seed(0)
    w_codes, w_scale, weight = random_operand(N, K, group_size)
    x_codes, x_scale, x = random_operand(M, K, group_size)
    outer, token, offset = torch.rand(1) + 0.5, torch.rand(M) + 0.5, torch.randn(N).bfloat16()
    config = Fp4Config(group_size, token_scaled=True, bias=bias)
    y = np.full((M, N), 0x7FFF, np.uint16)
    kernel = Kernel(ptx("gemm_fp4_sm120", "sm_120a", config, tmp_path))
    kernel.launch(
        (-(-N // 128), -(-M // 64)),
        128,
        [
            Argument(fp4_layout.fragment_order(fp4_layout.pack_codes(w_codes)).numpy().view(np.uint32), (2, 3)),
            Argument(as_words(fp4_layout.pack_scales(w_scale, K, group_size))),
            Argument(as_words(fp4_layout.pack_codes(x_codes))),
            Argument(as_words(fp4_layout.pack_scales(x_scale, K, group_size))),
            Argument(outer.numpy()),
            Argument(token.numpy()),
            Argument(offset.view(torch.int16).numpy().view(np.uint16)),
            Argument(y),
        ],
    )
    wanted = x @ weight.T * token.double().unsqueeze(1) * outer.double() + (offset.double() if bias else 0)
    found = torch.from_numpy(y.view(np.int16)).view(torch.bfloat16).double()
    error = (found - wanted).abs()
    assert bool((error <= wanted.abs() * 2**-8 + 1e-5 * wanted.abs().mean()).all())


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_linear_from_weights_to_outputs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Producer, packing and launch as a model runs them on sm_120, against the reference linear."""

    def emulated(config: Fp4Config, arch: str) -> Any:
        kernel = Kernel(ptx("gemm_fp4_sm120", "sm_120a", config, tmp_path))

        def launch(codes: Tensor, *rest: Tensor) -> None:
            *operands, y = rest
            arrays = [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (*operands, y)]
            found = [Argument(codes.numpy(), (2, 3)), *(Argument(t.numpy()) for t in arrays)]
            kernel.launch((-(-y.shape[1] // 128), -(-y.shape[0] // 64)), 128, found)

        return launch

    monkeypatch.setattr(gemm_fp4, "fp4_kernel", emulated)
    monkeypatch.setattr(gemm_fp4, "device_arch", lambda device: "sm_120")
    torch.manual_seed(0)
    linear = get_scheme(name).for_linear("x")
    weight = quantize_weight(torch.randn(40, 136), linear)
    x, perm, gain = torch.randn(5, 136), torch.randperm(136), torch.rand(136) + 0.5
    fed = gemm_fp4.build_rms_norm_quantize(linear, perm, gain, 1e-5)(x)
    y = gemm_fp4.build_linear(linear, weight, None)(fed)
    wanted = LINEAR.reference(linear, weight, None)(RMS_NORM_QUANTIZE.reference(linear, perm, gain, 1e-5)(x))
    error = (y.float() - wanted).abs()
    assert bool((error <= wanted.abs() * 2**-8 + 1e-5 * wanted.abs().mean()).all())


def ptx(module: str, arch: str, config: Fp4Config, folder: Path) -> str:
    """The PTX of a kernel, and its cubin in `folder`, compiled in a process of its own: the DSL takes one arch each."""
    code = (
        f"from atom.kernels.{module} import compile_gemm; from atom.kernels.fp4_config import Fp4Config;"
        f" k = compile_gemm({config!r}, '--keep-ptx --keep-cubin --dump-dir {folder}');"
        f" open({str(folder / 'kernel.ptx')!r}, 'w').write(k.__ptx__);"
        f" open({str(folder / 'kernel.cubin')!r}, 'wb').write(k.__cubin__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUTE_DSL_ARCH": arch})
    return (folder / "kernel.ptx").read_text()


WARP_MMA = r"mma\.sync\.aligned\.kind::mxf4nvf4\.block_scale\.scale_vec::"
TENSOR_MMA = r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.block"
KERNELS = [
    ("gemm_fp4_sm120", "sm_120a", 16, WARP_MMA + r"4X\S*ue4m3", r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X"),
    ("gemm_fp4_sm120", "sm_120a", 32, WARP_MMA + r"2X\S*ue8m0", r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8"),
    ("gemm_fp4_sm100", "sm_100a", 16, TENSOR_MMA + "16", r"UTCOMMA\.4X"),
    ("gemm_fp4_sm100", "sm_100a", 32, TENSOR_MMA + "32", r"UTCOMMA\b"),
]


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("module,arch,group_size,instruction,opcode", KERNELS)
def test_machine_code(
    module: str, arch: str, group_size: int, instruction: str, opcode: str, bias: bool, tmp_path: Path
) -> None:
    """The tensor core multiplies by the scales itself; no register is spilled."""
    text = ptx(module, arch, Fp4Config(group_size, token_scaled=group_size == 16, bias=bias), tmp_path)
    assert re.search(instruction, text)
    sass = disassemble((tmp_path / "kernel.cubin").read_bytes(), tmp_path)
    assert re.search(opcode, sass)
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_what_is_handed_on_is_the_reference_s(name: str) -> None:
    """Packed codes and tiled scales, read back through the index maps, are the rounded activation."""
    linear = get_scheme(name).for_linear("x")
    x = torch.randn(131, 200)
    x[3] = 0
    found = quantize_fp4(x, linear)
    assert linear.activation is not None and linear.activation.group_size is not None
    size = linear.activation.group_size
    codes = torch.stack((found.packed & 15, found.packed >> 4), -1).flatten(1)
    assert codes.shape == (131, 256) and not codes[:, 200:].any()
    tiles, group = fp4_layout.scale_tiles(200, size), torch.arange(-(-200 // size))
    raw = found.scale[fp4_layout.scale_index(torch.arange(131).unsqueeze(1), group, tiles)]
    scale = raw.view(torch.float8_e4m3fn).float() if size == 16 else torch.exp2(raw.float() - 127)
    values = code_values(codes[:, :200], get_format("e2m1")) * scale.repeat_interleave(size, 1)[:, :200]
    if found.outer is not None:
        values = values * found.outer.unsqueeze(1)
    assert torch.allclose(values, fake_quantize_activation(x, linear), rtol=1e-6, atol=0)


@pytest.mark.parametrize("arch,name", [("sm_100", "gemm_fp4_sm100"), ("sm_120", "gemm_fp4_sm120")])
def test_chosen_only_when_asked_for(arch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Blackwell they refuse until the user allows what has not run; other schemes and GPUs they refuse for good."""
    monkeypatch.delenv("ATOM_UNVERIFIED_KERNELS", raising=False)
    problem = Problem(arch, get_scheme("nvfp4").for_linear("x"), 64, 64)
    assert "not yet run on hardware" in LINEAR.refusals(problem)[name]
    with pytest.raises(UnsupportedError, match="ATOM_UNVERIFIED_KERNELS"):
        LINEAR.choose(problem)
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    assert LINEAR.choose(problem).name == name
    for op in (RMS_NORM_QUANTIZE, GATED_QUANTIZE, PERMUTE_QUANTIZE):
        assert op.choose(problem).name == "producers_fp4"
    assert "nvfp4 or mxfp4" in LINEAR.refusals(Problem(arch, get_scheme("w4a4").for_linear("x"), 64, 64))[name]
    assert "built for" in LINEAR.refusals(Problem("sm_90", get_scheme("nvfp4").for_linear("x"), 64, 64))[name]


@needs_dsl
def test_scale_tiles_are_cutlass_s() -> None:
    """The index map against the layout that the DSL gives tcgen05's scale factors."""
    from .dsl_scale_layout import GROUP_SIZE, SHAPE, scale_offsets

    (rows, K), wanted = SHAPE, torch.tensor(scale_offsets())
    row, group = torch.arange(rows).unsqueeze(1), torch.arange(K // GROUP_SIZE)
    tiles = -(-K // (GROUP_SIZE * 4))
    assert torch.equal(fp4_layout.scale_index(row, group, tiles), wanted)
