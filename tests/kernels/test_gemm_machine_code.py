"""The sm_90a GEMM's machine code, compiled without a GPU, and the cache that keeps it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atom.kernels.cache import kernel_key
from atom.kernels.gemm import ARCH
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.gemm_kinds import KINDS

from .machine_code import HAS_DSL, disassemble, needs_dsl

LLAMA = ((6144, 33), (4096, 33), (28672, 33), (4096, 113))  # features and units along K of Llama-3-8B, w4a4
TOKEN_SCALES = {
    "int4": "group",
    "int4_bf16": "none",
    "int4_uint4_bf16": "none",
    "e2m1_g32": "none",
}  # of a kind; else "token"


def chosen() -> list[GemmConfig]:
    """One config of each tile that the Llama-3-8B shapes run with, and some that only odd shapes or benchmarks meet."""
    found: dict[object, GemmConfig] = {}
    for weight in KINDS:
        outliers = weight == "int4"
        for tokens in (16, 64, 4096):
            for features, units in LLAMA[:: 1 if weight in ("int4", "e4m3") else 3]:
                config = choose_config(weight, TOKEN_SCALES.get(weight, "token"), tokens, features, units, outliers)
                found.setdefault((weight, config.tile_m, config.warpgroups, config.multicast), config)
    others = [
        GemmConfig("int4", "token", 64, 4, bias=True),
        GemmConfig("int4", "token", 16, 4, split=4),
        GemmConfig("int4", "group", 16, 4, split=4, pairs=True),
        GemmConfig("int4_uint4", "token", 16, 4, split=8, clustered=False, int8_units=True),
        GemmConfig("int4_uint4", "token", 16, 4, int8_units=True, ways=4),
        GemmConfig("int4_uint4", "token", 96, 2, int8_units=True),
        GemmConfig("int4_uint4", "token", 192, 2, int8_units=True),
        GemmConfig("int4_uint4", "token", 192, 3, int8_units=True),
        GemmConfig("int4_uint4", "token", 64, 4, split=8, clustered=False, int8_units=True),
        GemmConfig("int4_uint4", "token", 16, 4, split=4, int8_units=True),
        GemmConfig("int4_uint4", "token", 256, 2, int8_units=True),
        GemmConfig("int4", "group", 128, 2, int8_units=True, aligned=False),
        GemmConfig("int4_uint4", "token", 256, 2, multicast=2),
        GemmConfig("int4_uint4", "token", 128, 2, int8_units=True, tail=2),
        GemmConfig("int4_uint4_bf16", "none", 256, 2, tail=2),
        GemmConfig("int8", "token", 256, 2, tail=2),
        GemmConfig("int4_uint4", "token", 64, 4, int8_units=True, ways=4, split=2, clustered=False),
        GemmConfig("int4_uint4", "token", 16, 4, ways=4),
        GemmConfig("int4_uint4", "token", 128, 2, int8_units=True, ways=2, split=2, clustered=False),
        GemmConfig("int4_uint4_g32", "token", 16, 2, split=2, pairs=True, ctas_per_sm=2),
        GemmConfig("int4_uint4_g32", "token", 16, 4, split=4, pairs=True),
        GemmConfig("int4_uint4_g32", "token", 16, 2, ctas_per_sm=2, bounded=True),
        GemmConfig("int8", "token", 16, 4, ways=4),
        GemmConfig("int8", "token", 192, 3),
        GemmConfig("int4_uint4", "token", 128, 3, int8_units=True),
        GemmConfig("int4_uint4_bf16", "none", 192, 3, multicast=2),
        GemmConfig("int4_uint4_bf16", "none", 256, 2, multicast=2),
        GemmConfig("int4_uint4", "token", 128, 4, int8_units=True),
        GemmConfig("int4_uint4", "token", 64, 2, int8_units=True, ctas_per_sm=2),
        GemmConfig("int4", "group", 16, 4, split=8, int8_units=True, clustered=False),
    ]
    return list(dict.fromkeys([*found.values(), *(config.with_most_stages() for config in others)]))


WGMMA = {"int8": "IGMMA", "e4m3": "QGMMA", "bf16": "HGMMA"}


def name_of(config: GemmConfig) -> str:
    units = "-outliers" if config.int8_units else ""
    return f"{config.weight}-{config.token_scales}{units}-{config.tile_m}x{config.warpgroups}-split{config.split}"


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("config", chosen(), ids=name_of)
def test_machine_code(config: GemmConfig, tmp_path: Path) -> None:
    check_machine_code(config, tmp_path)


def check_machine_code(config: GemmConfig, tmp_path: Path) -> None:
    """Compiles for sm_90a without a GPU; uses its wgmma and bulk copies, spills nothing, serializes no wgmma."""
    from atom.kernels.gemm_sm90 import compile_gemm

    compiled = compile_gemm(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert {op for op in WGMMA.values() if op in sass} == {WGMMA[config.kind.operand]}
    assert "UBLKCP" in sass and "UTMALDG" in sass
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    # one ARRIVE for each group of wgmmas: more mean that ptxas serialized them; the last of those that run on while
    # the next unit is waited for has a wait of its own
    runs_on = config.kind.is_verbatim and not config.kind.promoted
    assert sass.count("WARPGROUP.ARRIVE") + runs_on == sass.count("WARPGROUP.DEPBAR")
    assert not overwritten_operands(sass), "a register that wgmma may still read is written"


def overwritten_operands(sass: str) -> list[str]:
    """Instructions between a wgmma and its wait that write one of the registers it takes A from.

    ptxas does not keep them apart: a load placed there once got A's registers, and results changed from run to run.
    """
    found, reading = [], set()
    for line in sass.splitlines():
        match = re.search(r"\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)\s+(.*);", line)
        if match is None:
            continue
        opcode, operands = match.groups()
        if opcode.startswith(("IGMMA", "HGMMA", "QGMMA")):
            source = re.match(r"R\d+, (?:R(\d+), )?gdesc", operands)
            assert source is not None, line
            if source[1] is not None:  # else A comes from shared memory
                reading |= set(range(int(source[1]), int(source[1]) + 4))
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            reading = set()
        elif reading and (target := re.match(r"R(\d+)", operands)) and not opcode.startswith(("ST", "RED", "SYNCS")):
            width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
            if reading & set(range(int(target[1]), int(target[1]) + width)):
                found.append(line.strip())
    return found


def test_overwritten_operands_are_found() -> None:
    racy = """
        /*0010*/ IGMMA.64x64x32.S8.S8.SAT R24, R56, gdesc[UR12], RZ, !UPT ;
        /*0020*/ LDS.128 R56, [R2+UR7+0xe400] ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/ LDS.128 R56, [R2+UR7+0xe400] ;
    """
    assert len(overwritten_operands(racy)) == 1


def test_kernel_cache_key_changes_with_config() -> None:
    if not HAS_DSL:
        pytest.skip("the CuTe DSL is not installed; its version is part of the key")
    one, two = chosen()[:2]
    assert kernel_key("gemm_sm90", one, ARCH) != kernel_key("gemm_sm90", two, ARCH)


@pytest.mark.slow
@needs_dsl
def test_a_warm_start_imports_no_compiler(tmp_path: Path) -> None:
    """A second process loads the library from the cache without importing cutlass."""
    program = (
        "import sys; from atom.kernels.gemm import gemm_kernel; from atom.kernels.gemm_config import GemmConfig\n"
        "gemm_kernel(GemmConfig('int4_uint4', 'token', 16, 2).with_most_stages()); print('cutlass' in sys.modules)"
    )
    environment = {**os.environ, "ATOM_CACHE": str(tmp_path)}
    answers = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert [a.strip() for a in answers] == ["True", "False"]
