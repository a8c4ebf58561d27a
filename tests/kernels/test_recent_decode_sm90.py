"""Decode attention over a cache whose newest tokens are exact: the kernels' PTX run on a CPU, and machine code."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.attention_config import SHARED_BYTES, DecodeConfig, choose_decode
from atom.kernels.attention_plan import AttentionPlan, plan_balanced, plan_fixed
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.paged_step import RecentLayer, RecentStep
from atom.kernels.recent_config import RecentConfig
from atom.quant.presets import KV4, KV8

from .machine_code import disassemble, needs_dsl
from .ptx_emulator import Kernel
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import ptx
from .test_paged_attention import Case, dequantized, make_case
from .test_recent_prefill import expected, with_recent

# format, head_dim, query heads, KV heads, newest tokens, rows of a ring, window, fixed split in blocks
RECENTS = [
    ("int4", 128, 8, 2, 16, 16, None, None),
    ("int4", 64, 3, 1, 32, 48, None, None),
    ("int4", 80, 12, 1, 16, 32, None, 2),
    ("int4", 256, 4, 1, 64, 64, 130, 2),
    ("int8", 128, 8, 1, 32, 32, None, None),
]
SPECS = {"int4": KV4, "int8": KV8}
LENGTHS = (1, 15, 16, 17, 33, 65, 95, 350)


def fill_ring(case: Case, capacity: int, numbers: list[int]) -> Tensor:
    """A ring store in which each sequence has the ring of its number; NaN where there is no token."""
    heads, dim = case.layout.num_kv_heads, case.layout.head_dim
    store = torch.full(((max(numbers) + 2) * capacity, 2, heads, dim), float("nan"), dtype=torch.bfloat16)
    for number, keys, values in zip(numbers, case.keys, case.values, strict=True):
        for position in range(max(0, len(keys) - capacity), len(keys)):
            row = number * capacity + position % capacity
            store[row, 0], store[row, 1] = keys[position], values[position]
    return store


def expected_recent(case: Case, spec: AttentionSpec, recent: int) -> Tensor:
    """Attention of decodes in float64, the last `recent` tokens as they were before rounding."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    assert case.layout.spec is not None
    for row, both in enumerate(zip(case.keys, case.values, strict=True)):
        first = 0 if spec.window is None else max(0, len(both[0]) - spec.window)
        k, v = (
            torch.cat((dequantized(x, case.layout.spec)[:-recent], x[-recent:].double()))[first:].repeat_interleave(
                case.q.shape[1] // x.shape[1], 1
            )
            for x in both
        )
        scores = torch.einsum("hd,lhd->hl", case.q[row].double(), k) * spec.scale
        out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
    return out


def emulate(
    case: Case, spec: AttentionSpec, plan: AttentionPlan, configs: tuple[DecodeConfig, RecentConfig],
    kernels: tuple[Kernel, Kernel], capacity: int,
) -> Tensor:  # fmt: skip
    """Both kernels over `case`, whose sequences have one query each: [T, heads, dim]."""
    decode, recent = configs
    tokens, heads, dim = case.q.shape
    numbers = list(reversed(range(1, tokens + 1)))
    store = fill_ring(case, capacity, numbers)
    out = np.full((tokens, heads, dim), 0x7FFF, dtype=np.uint16)
    near = np.full((tokens, heads, dim), np.nan, dtype=np.float32)
    near_lse = np.full((tokens, heads), np.nan, dtype=np.float32)
    slots = max(1, len(plan.segments))
    partial = np.full((slots, decode.queries, dim), np.nan, dtype=np.float32)
    lse = np.full((slots, decode.queries), np.nan, dtype=np.float32)
    counters = np.zeros(slots, dtype=np.int32)
    lengths, rows = case.step.seqlens_k.astype(np.int32), np.arange(tokens, dtype=np.int32)
    starts = np.array(numbers, dtype=np.int32) * capacity
    words = case.q.view(torch.int32).numpy()
    kernels[1].launch(
        (-(-tokens * case.layout.num_kv_heads // recent.rows), 1),
        32 * recent.warps,
        [
            Argument(words, (2,)), Argument(store.view(torch.int32).numpy(), (1, 3)), Argument(lengths),
            Argument(rows), Argument(starts), Argument(out, (2,)), Argument(near, (2,)), Argument(near_lse),
            float(spec.scale), 1, capacity,
        ],
        recent.shared_bytes,
    )  # fmt: skip
    nothing = Argument(np.zeros((1, dim // 2), dtype=np.float32), (1,))
    kernels[0].launch(
        (len(plan.work) - 1, 1),
        decode.threads,
        [
            Argument(words, (2,)), Argument(case.layer.numpy(), (2,)),
            Argument(np.ascontiguousarray(case.step.tables)), Argument(lengths), Argument(rows), Argument(plan.work),
            Argument(plan.segments, (1,)), Argument(out, (2,)), Argument(partial, (1, 2)), Argument(lse, (1,)),
            Argument(counters), nothing, nothing, nothing, nothing, Argument(near, (2,)), Argument(near_lse),
            float(spec.scale), 1.0, 0 if spec.window is None else spec.window - decode.recent, 1,
        ],
        SHARED_BYTES // decode.ctas_per_sm,
    )  # fmt: skip
    assert not counters.any(), "the next step wants zeros"
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,heads,kv_heads,recent,capacity,window,split", RECENTS, ids=lambda v: str(v))
def test_the_newest_tokens_are_exact(
    kv: str, dim: int, heads: int, kv_heads: int, recent: int, capacity: int, window: int | None, split: int | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Lengths around the window's and blocks' edges, rows split and whole, over a poisoned pool and ring."""
    from atom.kernels.paged_decode_sm90 import compile_decode
    from atom.kernels.recent_decode_sm90 import compile_recent

    case = make_case(SPECS[kv], LENGTHS, (1,) * len(LENGTHS), heads, kv_heads, dim, dtype=torch.bfloat16)
    spec, queries = AttentionSpec(dim**-0.5 * 2, window), heads // kv_heads
    config = choose_decode(
        kv, dim, queries, 16, window is not None, False, zero_bias=case.layout.zero_bias, recent=recent
    )
    own = RecentConfig(recent, dim, queries)
    options = f"--keep-ptx --dump-dir {tmp_path}"
    kernels = ptx(compile_decode(config, options)), ptx(compile_recent(own, options))
    far = np.maximum(np.array(LENGTHS) - recent, 0)
    beyond = None if window is None else window - recent
    if split is None:
        plan = plan_balanced(far, 16, kv_heads, 7, beyond, config.stage_blocks, 3, 2 * config.stage_blocks)
    else:
        plan = plan_fixed(far, 16, kv_heads, 7, split, beyond)
    assert (plan.segments[:, 5] > 1).any() and (plan.segments[:, 5] == 1).any()
    found = emulate(case, spec, plan, (config, own), kernels, capacity)
    exact = expected_recent(case, spec, recent)
    assert float((found.double() - exact).abs().max()) < 2e-2
    assert float((found.double() - exact).norm() / exact.norm()) < 5e-3
    rounded = expected_recent(case, spec, 1)
    assert float((rounded - exact).norm() / exact.norm()) > 0.01 or kv != "int4", "the window matters"


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("split_tokens", [None, 32])
def test_sequences_grow_beyond_the_window(emulator: None, split_tokens: int | None) -> None:
    """Under one plan but where one's first token leaves it. One has no ring: its newest tokens lie in a row."""
    recent, capacity, dim, spec = 16, 32, 64, AttentionSpec(0.25)
    whole = make_case(KV4, (19, 60, 100, 9, 1), (1,) * 5, 4, 1, dim, dtype=torch.bfloat16)
    numbers = [3, 1, 2, 4, 0]
    starts = np.array(numbers, dtype=np.int64) * capacity
    attend, plans = PagedAttentionSm90(whole.layout, split_tokens=split_tokens), []
    for back in (3, 2, 1, 0):
        lengths = whole.step.seqlens_k - np.array([back, back, back, back, 0], dtype=np.int32)
        both = [[x[:n] for x, n in zip(part, lengths, strict=True)] for part in (whole.keys, whole.values)]
        case = replace(whole, keys=both[0], values=both[1])
        ring = fill_ring(case, capacity, numbers)
        for part, of_part in enumerate(both):
            ring[3 : 3 + recent, part] = of_part[1][-recent:]
        places = starts.astype(np.int32)
        places[1] = ~3
        own = RecentStep(recent, capacity, torch.from_numpy(places), starts, torch.zeros(5, dtype=torch.int64), True)
        step = replace(whole.step, seqlens_k=lengths, recent=own, _derived={})
        attend.prepare(step, [None], 4)
        plans.append(step.derive(("plan", None), lambda: None))
        found = attend(case.q, case.layer, step, spec, None, RecentLayer(ring, ring[:0])).double()
        exact = expected_recent(replace(case, step=step), spec, recent)
        assert float((found - exact).norm() / exact.norm()) < 5e-3
    if split_tokens is None:
        assert plans[1] is not plans[0] and plans[2] is plans[1] and plans[3] is plans[2]


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 0, 2, 1, 33, 1, 60, 1), (0, 1, 16, 17, 1, 1, 1, 40)])
@pytest.mark.parametrize("window", [None, 40])
def test_chunks_beside_decodes(emulator: None, counts: tuple[int, ...], window: int | None) -> None:
    """Each token of a step in its place, whichever kernel gave it."""
    case = make_case(KV4, (1, 15, 16, 17, 33, 70, 100, 40), counts, 4, 2, 64, dtype=torch.bfloat16)
    layer, spec = with_recent(case, 16, 32), AttentionSpec(0.125, window)
    found = PagedAttentionSm90(case.layout)(case.q, case.layer, case.step, spec, None, layer).double()
    exact = expected(case, spec)
    assert float((found - exact).abs().max()) < 2e-2
    assert float((found - exact).norm() / exact.norm()) < 5e-3


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("tokens,dim,queries", [(16, 128, 4), (32, 128, 8), (64, 256, 4), (16, 64, 16)])
def test_machine_code(tokens: int, dim: int, queries: int, tmp_path: Path) -> None:
    """Spills nothing; fragments are loaded 16 bytes at a time, and nothing but mma multiplies."""
    from atom.kernels.recent_decode_sm90 import compile_recent

    config = RecentConfig(tokens, dim, queries)
    compiled = compile_recent(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) == config.columns * (2 * config.key_rounds + dim // 16)
    loads = (2 + config.columns) * config.key_rounds + 4 * config.value_rounds
    assert len(re.findall(r"LDG\.E\.NA\.128|LDG\.E\.128", sass)) == loads
