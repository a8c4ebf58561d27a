"""The sm_90a rope_append_kv kernel: its PTX run on a CPU, its machine code without a GPU, its bytes on one."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.attention_config import AppendConfig
from atom.kernels.head_norm import HeadNorms
from atom.kernels.kv_layout import KVLayout
from atom.kernels.rope_append import rope_append_kv_reference
from atom.quant import mean_zero
from atom.quant.formats import get_format
from atom.quant.rounding import largest_scale

from .machine_code import disassemble
from .ptx_memory import Part
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import SPECS, needs_dsl, ptx

# kv, head_dim, query heads, KV heads, block size, offset, tasks a warp
APPENDS = [
    ("int4", 128, 4, 2, 16, True, 1),
    ("int4", 64, 3, 1, 32, False, 4),
    ("int4", 256, 2, 1, 16, False, 2),
    ("int4", 128, 9, 5, 16, False, 3),
    ("int8", 80, 4, 2, 64, True, 2),
    ("fp8_e4m3", 96, 2, 2, 16, False, 1),
    ("bf16", 128, 4, 1, 16, False, 4),
]


def inputs(dim: int, heads: int, kv_heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (with zeros, one loud channel, one sign alone), cos and sin."""
    generator = torch.Generator().manual_seed(dim)
    q = torch.randn(tokens, heads, dim, generator=generator).bfloat16()
    k, v = torch.randn(2, tokens, kv_heads, dim, generator=generator).bfloat16()
    v[0] = 0
    v[1] = v[1].abs()
    v[2, ..., 3] *= 1000
    k[3] = 0
    angles = torch.rand(tokens, dim // 2, generator=generator) * 1000
    return q, k, v, angles.cos(), angles.sin()


def offset_for(kv_heads: int, dim: int) -> Tensor:
    return torch.randn(kv_heads, dim, generator=torch.Generator().manual_seed(1)) * 5


def appended(
    config: AppendConfig,
    layout: KVLayout,
    q_k_v: Sequence[Part | Argument],
    steps: tuple[Tensor, Tensor, Tensor],
    heads: int,
    constants: tuple[np.ndarray, ...],
    eps: float,
    tmp_path: Path,
    exact: tuple[Argument, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel returns, and a cache of four blocks that it wrote to, 255 before.

    steps      cosines, sines, slots
    constants  of keys the offset, then centre and mirrors; of norms the weights
    exact      the store of unrounded keys and values, and rows in it, where the config has them
    """
    from atom.kernels.rope_append_sm90 import compile_append

    cos, sin, slots = (x.numpy() for x in steps)
    kernel = ptx(compile_append(config, f"--keep-ptx --dump-dir {tmp_path}"))
    found = np.full(layout.shape(4), 255, dtype=np.uint8)
    out = np.zeros((len(slots), heads, layout.head_dim // 2), dtype=np.int32)
    kernel.launch(
        (config.ctas(len(slots), heads, layout.num_kv_heads), 1),
        32 * config.warps,
        [
            *q_k_v,
            Argument(cos, (1,)),
            Argument(sin, (1,)),
            Argument(slots),
            *(Argument(x, (1,)) for x in constants),
            Argument(found, (2,)),
            Argument(out, (2,)),
            *exact,
            1.0 if layout.spec is None else largest_scale(get_format(layout.spec.format)),
            eps,
        ],
    )
    return out, found


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,heads,kv_heads,block_size,has_offset,parts", APPENDS, ids=lambda v: str(v))
def test_bytes_on_a_model_of_the_machine(
    kv: str,
    dim: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    has_offset: bool,
    parts: int,
    tmp_path: Path,
) -> None:
    """Equal to the reference's bit for bit; a token without a slot writes nothing."""
    tokens = 5
    q, k, v, cos, sin = inputs(dim, heads, kv_heads, tokens)
    layout = KVLayout(SPECS[kv], torch.bfloat16, kv_heads, dim, block_size)
    slots = torch.tensor([block_size - 1, 2 * block_size, 3 * block_size + 7, 5, -1])
    offset = offset_for(kv_heads, dim) if has_offset else None
    wanted = torch.full(layout.shape(4), 255, dtype=torch.uint8)
    append = rope_append_kv_reference(layout)
    append(q[:4], k[:4], v[:4], cos[:4], sin[:4], slots[:4], wanted, offset)
    turned = append(q, k, v, cos, sin, slots.clamp(min=0), wanted.clone(), offset)

    config = AppendConfig(kv, dim, block_size, 1.0, has_offset, parts)
    whole = torch.cat((q, k, v), 1).view(torch.int32).numpy()  # as one product of the stacked projections gives them
    ends = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
    offsets = (torch.zeros(1, dim) if offset is None else offset).bfloat16().view(torch.int32).numpy()
    parts = [Part(whole, (2,), start, stop) for start, stop in pairwise(ends)]
    constants = (offsets, np.zeros((1, dim), dtype=np.float32), np.zeros((2, dim // 2), dtype=np.int32))
    out, found = appended(config, layout, parts, (cos, sin, slots), heads, constants, 0.0, tmp_path)
    assert torch.equal(torch.from_numpy(out).view(torch.bfloat16), turned)
    assert torch.equal(torch.from_numpy(found), wanted)


# kv, head_dim, norm, centre, transform, mirror and zero points that keep the mean
TRANSFORMS = [
    ("int4", 128, "none", True, False, False),
    ("int4", 128, "none", False, True, False),
    ("int4", 64, "plain", True, True, False),
    ("int4", 256, "shifted", True, True, False),
    ("int8", 80, "plain", False, True, False),
    ("fp8_e4m3", 96, "shifted", True, True, False),
    ("bf16", 128, "plain", False, False, False),
    ("bf16", 128, "none", False, True, False),
    ("int4", 64, "plain", True, True, True),
    ("int4", 96, "none", True, True, True),
    ("int4", 128, "none", True, True, True),
    ("int4", 256, "shifted", True, True, True),
    ("int8", 80, "plain", True, True, True),
]


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv,dim,norm,has_centre,rotates,has_mirror", TRANSFORMS, ids=lambda v: str(v))
def test_transformed_bytes_on_a_model_of_the_machine(
    kv: str, dim: int, norm: str, has_centre: bool, rotates: bool, has_mirror: bool, tmp_path: Path
) -> None:
    """The norm before turning, the centre, the Hadamard transform and the mirror after it, bit for bit.

    Where heads are turned, what is rounded is stored unrounded too, but for a token without a row there.
    """
    tokens, heads, kv_heads, eps = 4, 6 if has_mirror else 5, 2, 1e-6
    q, k, v, cos, sin = inputs(dim, heads, kv_heads, tokens)
    spec = SPECS[kv]
    if has_mirror:
        assert spec is not None
        spec = replace(spec, zero="mean")
        v[3] = 2.5  # all alike
    layout = KVLayout(spec, torch.bfloat16, kv_heads, dim, 16)
    slots = torch.tensor([15, 32, 55, 5])
    weights = torch.randn(2, dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    centre = offset_for(kv_heads, dim)
    if has_mirror:
        mirror = torch.randn(kv_heads, dim, generator=torch.Generator().manual_seed(3))
        centre = torch.stack((centre, mirror * 2**0.5 / mirror.norm(dim=-1, keepdim=True)))
    wanted = torch.full(layout.shape(4), 255, dtype=torch.uint8)
    given = {
        "centre": centre if has_centre else None,
        "norms": None if norm == "none" else HeadNorms(*weights, eps, float(norm == "shifted")),
    }
    rows = torch.tensor([6, 0, -1, 3])
    wanted_exact = torch.full((7, 2, kv_heads, dim), 255.0).bfloat16()
    found_exact = wanted_exact.clone().view(torch.int32).numpy()
    turned = rope_append_kv_reference(layout, rotates=rotates)(
        q, k, v, cos, sin, slots, wanted, **given, exact=wanted_exact if rotates else None, exact_slots=rows
    )

    config = AppendConfig(
        kv, dim, 16, parts=2, norm=norm, has_centre=has_centre, rotates=rotates, has_mirror=has_mirror,
        zero_bias=layout.zero_bias, has_recent=rotates,
    )  # fmt: skip
    exact = (Argument(found_exact, (1, 3)), Argument(rows.numpy())) if rotates else ()
    separate = [Argument(x.contiguous().view(torch.int32).numpy(), (2,)) for x in (q, k, v)]
    offsets = np.zeros((1, dim // 2), dtype=np.int32)
    constants = (offsets, centre.view(-1, dim).numpy(), weights.view(torch.int32).numpy())
    out, found = appended(config, layout, separate, (cos, sin, slots), heads, constants, eps, tmp_path, exact)
    assert torch.equal(torch.from_numpy(out).view(torch.bfloat16), turned)
    assert torch.equal(torch.from_numpy(found), wanted)
    assert torch.equal(torch.from_numpy(found_exact).view(torch.bfloat16), wanted_exact)


@needs_dsl
def test_ranges_end_where_the_reference_s_do() -> None:
    from atom.kernels import append_codes_sm90

    assert append_codes_sm90.LARGEST_RANGE == mean_zero.LARGEST_RANGE


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("has_mirror", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_transforms_spill_nothing(dim: int, has_mirror: bool, tmp_path: Path) -> None:
    from atom.kernels.rope_append_sm90 import compile_append

    config = AppendConfig(
        "int4", dim, 16, parts=2, norm="shifted", has_centre=True, rotates=True, has_mirror=has_mirror,
        zero_bias=8 * has_mirror, has_recent=has_mirror,
    )  # fmt: skip
    compiled = compile_append(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv", SPECS)
def test_machine_code(kv: str, tmp_path: Path) -> None:
    """Spills nothing, and no product is fused with a sum: each is rounded by itself, as torch rounds it."""
    from atom.kernels.rope_append_sm90 import compile_append

    config = AppendConfig(kv, 128, 16, parts=2)
    compiled = compile_append(config, f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    turned = 2 * 2 * 4 * 6  # tasks, of queries or keys, words, four products and two sums
    found = re.findall(r"\b(?:HFMA2(?:\.MMA)?|HMUL2|HADD2)\.BF16_V2 (.*);", sass)
    assert len(found) == turned, "pairs of bfloat16 are multiplied and added"
    fused = [f for f in found if f.count(",") == 3 and not re.search(r"-RZ|1, 1,", f)]
    assert not fused, "a product was fused with a sum: torch rounds each"
