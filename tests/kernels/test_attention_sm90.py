"""The sm_90a attention kernels: their PTX run on a CPU, their machine code without a GPU, their numbers on one."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.attention_config import (
    SHARED_BYTES,
    DecodeConfig,
    choose_decode,
    row_token,
    word_index,
)
from atom.kernels.attention_plan import AttentionPlan, plan_balanced, plan_fixed
from atom.kernels.attention_sm90 import turn_matrix
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.paged_attention import RopeTable
from atom.kernels.paged_step import PagedStep
from atom.kernels.rotate import rotate
from atom.models.rope import Rope, RopeConfig
from atom.quant.presets import KV4, KV4_WHOLE, KV8, KVFP8
from atom.quant.schemes import TensorSpec

from .machine_code import disassemble, needs_dsl
from .ptx_emulator import Kernel
from .ptx_memory import Tensor as Argument
from .test_paged_attention import Case, expected, make_case

SPECS: dict[str, TensorSpec | None] = {"int4": KV4_WHOLE, "int8": KV8, "fp8_e4m3": KVFP8, "bf16": None}


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 4, 8, 16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_configs_fit_the_machine(kv: str, dim: int, queries: int, block_size: int) -> None:
    config = choose_decode(kv, dim, queries, block_size, False, False)
    shared = config.stages * (config.stage_bytes + 16) + config.merge_bytes + 2 * (config.query_bytes + 48)
    assert config.stages >= config.warps and not config.stages % config.warps, "a slot is always one warp's"
    assert config.ctas_per_sm * (shared + 1024) <= SHARED_BYTES + 1024
    assert config.ctas_per_sm * config.stages * config.stage_bytes >= 33_000, "what hides a microsecond of latency"
    layout = make_case(SPECS[kv], (1,), (1,), queries, 1, dim, block_size, dtype=torch.bfloat16).layout
    assert (config.tile_bytes, config.row_bytes, config.word_bytes) == (
        layout.tile_bytes,
        layout.row_bytes,
        layout.word_bytes,
    )


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv", SPECS)
def test_lanes_share_a_row(kv: str, dim: int) -> None:
    """Every word of a row is read, keys by 4 lanes, values by 8; what is read twice stands past the row's end."""
    config = DecodeConfig(kv, dim, 1)
    for sharers, words in ((4, config.key_words), (8, config.value_words)):
        found = [word_index(sharers, words, config.row_words, s, w) for s in range(sharers) for w in range(words)]
        assert set(found) == set(range(config.row_words)) and len(found) - config.row_words < sharers
    assert sorted(row_token(r) for r in range(16)) == list(range(16))


def emulate_decode(
    case: Case,
    spec: AttentionSpec,
    plan: AttentionPlan,
    config: DecodeConfig,
    kernel: Kernel,
    table: RopeTable | None = None,
) -> Tensor:
    """The decode and merge kernels over `case`, whose sequences have one query each; bfloat16 [T, heads, dim]."""
    tokens, heads, dim = case.q.shape
    out = np.full((tokens, heads, dim), 0x7FFF, dtype=np.uint16)
    slots = max(1, len(plan.segments))
    partial = np.full((slots, config.queries, dim), np.nan, dtype=np.float32)
    lse = np.full((slots, config.queries), np.nan, dtype=np.float32)
    rows = np.arange(tokens, dtype=np.int32)
    cap = spec.soft_cap
    counters = np.zeros(slots, dtype=np.int32)
    nothing = torch.zeros(1, dim // 2)
    offsets = [nothing, nothing, nothing, nothing]
    if table is not None and spec.key_offset is not None:
        turns = turn_matrix(table, config.stage_tokens).view(torch.int32)
        offsets = [spec.key_offset.bfloat16().view(torch.int32), table.cos, table.sin, turns]
    kernel.launch(
        (len(plan.work) - 1, 1),
        config.threads,
        [
            Argument(case.q.view(torch.int32).numpy(), (2,)),
            Argument(case.layer.numpy(), (2,)),
            Argument(np.ascontiguousarray(case.step.tables)),
            Argument(case.step.seqlens_k.astype(np.int32)),
            Argument(rows),
            Argument(plan.work),
            Argument(plan.segments, (1,)),
            Argument(out, (2,)),
            Argument(partial, (1, 2)),
            Argument(lse, (1,)),
            Argument(counters),
            *(Argument(x.numpy(), (1,)) for x in offsets),
            float(spec.scale if cap is None else spec.scale / cap),
            float(1.0 if cap is None else cap),
            spec.window or 0,
            1,
        ],
        SHARED_BYTES // config.ctas_per_sm,
    )
    assert not counters.any(), "the next step wants zeros"
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)


def ptx(compiled: object) -> Kernel:
    return Kernel(compiled.__ptx__)  # type: ignore[attr-defined]


def decode_ptx(config: DecodeConfig, folder: Path) -> Kernel:
    from atom.kernels.paged_decode_sm90 import compile_decode

    return ptx(compile_decode(config, f"--keep-ptx --dump-dir {folder}"))


# kv, head_dim, query heads, KV heads, block size, window, cap, CTAs, fixed split in blocks
DECODES = [
    ("int4", 128, 8, 2, 16, None, None, 7, None),
    ("int4", 64, 3, 3, 32, 70, None, 7, None),
    ("int4", 80, 12, 1, 64, None, 3.0, 5, None),
    ("int4", 64, 4, 1, 64, 40, None, 3, None),  # a window that begins behind the first tokens of a stage
    ("int4", 64, 8, 1, 32, 70, None, 3, 2),
    ("int4", 256, 4, 1, 16, 33, None, 3, 2),
    ("int8", 128, 4, 1, 16, None, None, 7, None),
    ("fp8_e4m3", 96, 4, 2, 16, 40, None, 3, 2),
    ("bf16", 128, 4, 1, 16, None, None, 7, None),
]


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,heads,kv_heads,block_size,window,cap,ctas,split", DECODES, ids=lambda v: str(v))
def test_decode_on_a_model_of_the_machine(
    kv: str,
    dim: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    window: int | None,
    cap: float | None,
    ctas: int,
    split: int | None,
    tmp_path: Path,
) -> None:
    """Its PTX, instruction by instruction: ragged lengths over a poisoned pool, rows split and whole."""
    lengths = (1, block_size, block_size + 1, 95, 2 * block_size - 1, 170)
    case = make_case(SPECS[kv], lengths, (1,) * 6, heads, kv_heads, dim, block_size, dtype=torch.bfloat16)
    spec = AttentionSpec(dim**-0.5 * 2, window, cap)
    config = choose_decode(kv, dim, heads // kv_heads, block_size, window is not None, cap is not None)
    if split is None:
        plan = plan_balanced(
            np.array(lengths), block_size, kv_heads, ctas, window, config.stage_blocks, 3, 2 * config.stage_blocks
        )
    else:
        plan = plan_fixed(np.array(lengths), block_size, kv_heads, ctas, split, window)
    assert (plan.segments[:, 5] > 1).any() and (plan.segments[:, 5] == 1).any(), (
        "the test wants rows that are split and rows that are not"
    )
    kernel = decode_ptx(config, tmp_path)
    found = emulate_decode(case, spec, plan, config, kernel)
    exact = expected(case, spec)
    assert float((found.double() - exact).abs().max()) < 2e-2
    assert float((found.double() - exact).norm() / exact.norm()) < 5e-3
    if block_size == 16 and dim == 128:  # rows of one chunk: less is fetched before the kernel before has ended
        plan.segments[:, 7] = np.minimum(100, case.step.seqlens_k[plan.segments[:, 0]] - 1)
        assert torch.equal(emulate_decode(case, spec, plan, config, kernel), found)
    if split is not None:  # the longest sequence alone, on other CTAs: not a bit differs
        last = slice(5, 6)
        step = PagedStep(
            np.array([0, 1]), case.step.seqlens_k[last], case.step.tables[last], case.step.slots, case.step.block_tables
        )
        alone = replace(case, q=case.q[last], step=step)
        plan = plan_fixed(step.seqlens_k, block_size, kv_heads, 2, split, window)
        assert torch.equal(emulate_decode(alone, spec, plan, config, kernel), found[last])


@needs_dsl
@pytest.mark.slow
def test_rings_that_go_round(tmp_path: Path) -> None:
    """Segments longer than the ring and than 32 blocks, several a CTA: copies arrive late, warps run ahead."""
    lengths = (1100, 610, 33, 700)
    case = make_case(KV4, lengths, (1,) * 4, 3, 1, 64, dtype=torch.bfloat16)
    spec = AttentionSpec(0.25)
    config = replace(choose_decode("int4", 64, 3, 16, False, False, zero_bias=case.layout.zero_bias), ctas_per_sm=6)
    assert config.stages < 20
    plan = plan_balanced(np.array(lengths) - 20, 16, 1, 2, None, config.stage_blocks)  # they have grown since
    found = emulate_decode(case, spec, plan, config, decode_ptx(config, tmp_path)).double()
    exact = expected(case, spec)
    assert float((found - exact).norm() / exact.norm()) < 5e-3


@needs_dsl
@pytest.mark.slow
def test_a_cta_of_many_parts(tmp_path: Path) -> None:
    """More than a warp tells of at once, of a row with more parts than are merged at once."""
    lengths = (1120, 5, 40)
    case = make_case(KV4_WHOLE, lengths, (1,) * 3, 4, 1, 64, dtype=torch.bfloat16)
    spec, config = AttentionSpec(0.25), choose_decode("int4", 64, 4, 16, False, False)
    kernel = decode_ptx(config, tmp_path)
    exact = expected(case, spec)
    for ctas in (1, 3):
        plan = plan_fixed(np.array(lengths), 16, 1, ctas, 2)
        assert len(plan.segments) == 38
        found = emulate_decode(case, spec, plan, config, kernel)
        assert float((found.double() - exact).norm() / exact.norm()) < 5e-3


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,queries", [("int4", 128, 4), ("int4", 128, 8), ("int8", 128, 4), ("bf16", 64, 8)])
def test_machine_code(kv: str, dim: int, queries: int, tmp_path: Path) -> None:
    """Spills nothing; bulk copies, tensor cores and vector loads are where they should be; a code costs little."""
    from atom.kernels.paged_decode_sm90 import compile_decode

    config = choose_decode(kv, dim, queries, 16, True, True)
    compiled = compile_decode(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    assert "UBLKCP" in sass and "LDS.128" in sass
    multiplied = len(re.findall(r"HMMA\.16816\.F32", sass))
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) == (multiplied if kv == "bf16" else 0)
    between = [part.count("HMMA.16816") for part in sass.split("SYNCS.ARRIVE")]
    assert max(between) == multiplied, "a slot is released before its last product: its loads may still be under way"
    assert multiplied == config.stage_tokens // 16 * config.column_tiles * (dim // 16) * 2
    if kv == "int4":
        assert not re.findall(r"\bI2F", sass)
        words = config.stage_tokens * config.row_words * 2 // 32  # that a lane reads of a stage
        assert len(re.findall(r"\bLOP3", sass)) < 4 * words + 100, "a pair of codes is one instruction"
        bit_work = len(re.findall(r"\b(?:LOP3|SHF|PRMT)", sass))
        assert bit_work < 5.5 * words + 250, "and another for every two, or four, pairs"


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,heads", [("int4", 128, 4), ("int8", 80, 12)])
def test_a_key_offset_on_a_model_of_the_machine(kv: str, dim: int, heads: int, tmp_path: Path) -> None:
    """What was taken off the keys, turned by each position, is in the scores: loud in some channels, YaRN's factor."""
    lengths = (1, 17, 95)
    case = make_case(SPECS[kv], lengths, (1,) * 3, heads, 1, dim, dtype=torch.bfloat16)
    offset = torch.randn(1, dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    offset[:, ::9] *= 20
    rotation = Rope(RopeConfig("yarn", factor=4.0, attention_factor=1.2), dim)(torch.arange(256))
    common = rotate(offset.double().expand(256, 1, dim), rotation.cos.double(), rotation.sin.double())
    spec = AttentionSpec(0.5 * dim**-0.5, None, None, offset)
    config = choose_decode(kv, dim, heads, 16, False, False, has_offset=True)
    plan = plan_balanced(np.array(lengths), 16, 1, 4, None, config.stage_blocks, 3, 2 * config.stage_blocks)
    table = RopeTable(rotation.cos, rotation.sin)
    found = emulate_decode(case, spec, plan, config, decode_ptx(config, tmp_path), table)
    exact = expected(case, spec, common)
    rounded = expected(case, spec, common, bfloat16_keys=True)
    assert (found.double() - exact).norm() < 2 * (rounded - exact).norm() + 4e-3 * exact.norm()
    without = expected(case, spec)
    assert float((without - exact).norm() / exact.norm()) > 0.1, "the offset matters"
