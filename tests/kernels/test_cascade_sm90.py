"""Prefixes that sequences share, read together by the sm_90a kernels: their PTX is run on a CPU (conftest.emulator)."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atom.kernels import cascade_sm90
from atom.kernels.attention_config import choose_decode, choose_prefix
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.cascade_plan import Costs
from atom.kernels.dense_attention import AttentionSpec

from .machine_code import disassemble
from .test_attention_sm90 import SPECS, needs_dsl
from .test_paged_attention import Case, expected, make_case

KV_FORMATS = ("int4", "int8", "fp8_e4m3", "bf16")


def share(case: Case, groups: dict[int, tuple[tuple[int, ...], int]], block_size: int) -> None:
    """Let sequences begin with another's blocks: first -> (others, blocks)."""
    for first, (others, blocks) in groups.items():
        for other in others:
            case.step.tables[other, :blocks] = case.step.tables[first, :blocks]
            for x in (case.keys, case.values):
                x[other][: block_size * blocks] = x[first][: block_size * blocks]
    case.step.block_tables.copy_(torch.from_numpy(case.step.tables))


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize(
    "kv,dim,heads,kv_heads,block_size,cap",
    [
        ("int4", 128, 8, 2, 16, None),
        ("int4", 64, 1, 1, 32, None),
        ("int8", 80, 7, 1, 16, 3.0),
        ("fp8_e4m3", 64, 16, 1, 16, None),
        ("bf16", 64, 4, 1, 64, None),
    ],
)
def test_shared_rows(
    emulator: None, kv: str, dim: int, heads: int, kv_heads: int, block_size: int, cap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two groups, of which one is more than a row holds where heads are many, and sequences that share nothing."""
    monkeypatch.setattr(cascade_sm90, "Costs", lambda *costs: Costs())  # as if nothing cost anything
    lengths = np.array([9, 9, 7, 8, 5, 1, 14, 14, 13, 12]) * block_size // 2 + 3
    case = make_case(SPECS[kv], tuple(lengths), (1,) * 10, heads, kv_heads, dim, block_size, dtype=torch.bfloat16)
    share(case, {0: ((1, 2, 3), 3), 6: ((4, 7, 8, 9), 2)}, block_size)
    spec, queries = AttentionSpec(2 * dim**-0.5, None, cap), heads // kv_heads
    attend = PagedAttentionSm90(case.layout)
    assert attend.prepare(case.step, [None, 50], queries)
    found = attend(case.q, case.layer, case.step, spec)
    exact = expected(case, spec)
    assert float((found.double() - exact).abs().max()) < 2e-2
    assert float((found.double() - exact).norm() / exact.norm()) < 5e-3
    alone = PagedAttentionSm90(case.layout, split_tokens=64)
    step = replace(case.step, _derived={})
    assert not alone.prepare(step, [None], queries), "results do not depend on the batch"


@needs_dsl
@pytest.mark.slow
def test_a_plan_goes_on_while_tables_share(emulator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences grow by a token under one plan; another's blocks in a table end it, and so does another row."""
    monkeypatch.setattr(cascade_sm90, "Costs", lambda *costs: Costs())  # as if nothing cost anything
    case = make_case(SPECS["int4"], (70, 75, 80, 90, 40), (1,) * 5, 4, 1, 64, dtype=torch.bfloat16)
    share(case, {0: ((1, 2, 3), 4)}, 16)
    attend, spec = PagedAttentionSm90(case.layout), AttentionSpec(0.25)
    assert attend.prepare(case.step, [None], 4)
    plan = attend.plans[8, 0]
    before = replace(case.step, seqlens_k=case.step.seqlens_k - 1, _derived={})  # a step back, then on again
    assert attend.prepare(before, [None], 4) and attend.plans[8, 0] is not plan
    plan = attend.plans[8, 0]
    on = replace(case.step, _derived={})
    assert attend.prepare(on, [None], 4) and attend.plans[8, 0] is plan
    found, exact = attend(case.q, case.layer, on, spec).double(), expected(case, spec)
    assert float((found - exact).norm() / exact.norm()) < 5e-3
    tables = case.step.tables.copy()
    tables[:4, 0] = [1, 2, 3, 4]
    other = replace(case.step, tables=tables, seqlens_k=case.step.seqlens_k + 1, _derived={})
    assert not attend.prepare(other, [None], 4)


@needs_dsl
@pytest.mark.slow
def test_tokens_of_this_step_are_no_prefix(emulator: None) -> None:
    """A prompt's tokens as rows of a step: what they store is read by each, what was there before together."""
    one = make_case(SPECS["int4"], (105, 40), (1, 1), 4, 1, 64, dtype=torch.bfloat16)
    lengths, ahead = np.array([*range(100, 106), 40]), np.array([*range(6), 0])
    owners = [0] * 6 + [1]
    step = replace(
        one.step, cu_seqlens_q=np.arange(8), seqlens_k=lengths, tables=one.step.tables[owners], ahead=ahead,
        block_tables=one.step.block_tables[owners].contiguous(), slots=one.step.slots[owners], _derived={},
    )  # fmt: skip
    keys, values = ([x[o][:length] for o, length in zip(owners, lengths, strict=True)] for x in (one.keys, one.values))
    q = torch.randn(7, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    case, spec = replace(one, keys=keys, values=values, q=q, step=step), AttentionSpec(0.25)
    attend = PagedAttentionSm90(case.layout)
    assert attend.prepare(step, [None], 4, "always")
    cascade = attend.plans[8, 0].cascade
    assert cascade is not None and cascade.skipped.tolist() == [99 // 16] * 6 + [0]
    found, exact = attend(q, case.layer, step, spec).double(), expected(case, spec)
    assert float((found - exact).norm() / exact.norm()) < 5e-3
    assert attend.plans[8, 0].buffers.segments[0, 7] == 0 and 5 in attend.plans[8, 0].buffers.segments[:, 7].tolist()
    following = replace(step, seqlens_k=lengths + 1, ahead=None, _derived={})
    assert not attend.plans[8, 0].goes_on(following, following.seqlens_k, np.arange(7))


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", range(1, 17))
def test_configs_of_shared_rows(kv: str, dim: int, queries: int) -> None:
    """Every problem that decodes has one: whole sequences in a warp's columns, a ring, one tile of tokens at a time."""
    for block_size in (16, 32, 64):
        config = choose_prefix(kv, dim, queries, block_size, False)
        assert config.own_queries == queries and config.members % config.warps == 0
        assert config.groups == 1 and config.column_tiles == 2 and config.stages >= 2
        assert choose_decode(kv, dim, queries, block_size, False, False).members == 0


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,queries", [("int4", 4), ("bf16", 1)])
def test_machine_code(kv: str, queries: int, tmp_path: Path) -> None:
    """Next to nothing spills, codes are multiplied as they are, and no slot is released before its last product."""
    from atom.kernels.prefix_decode_sm90 import compile_prefix

    config = choose_prefix(kv, 128, queries, 16, False)
    compiled = compile_prefix(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) < 40 and not re.findall(r"\bI2F", sass)
    multiplied = 2 * config.stage_tokens // 16 * config.column_tiles * (128 // 16) * 2  # whole stages, and edges
    between = [part.count("HMMA.16816") for part in sass.split("SYNCS.ARRIVE")]
    assert max(between) == sum(between) == multiplied
