"""The sm_90a gather kernel: its PTX run on a CPU, its machine code without a GPU."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels.attention_config import GatherConfig
from atom.kernels.prefill_plan import plan_prefill

from .machine_code import disassemble
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import SPECS, needs_dsl, ptx
from .test_paged_attention import make_case

# kv, head_dim, block size, rule of zero points
GATHERS = [
    ("int4", 128, 16, "whole"),
    ("int4", 80, 32, "whole"),
    ("int8", 64, 64, "whole"),
    ("fp8_e4m3", 96, 16, "whole"),
    ("bf16", 256, 16, "whole"),
    ("int4", 64, 16, "mean"),
    ("int4", 128, 32, "mean"),
    ("int8", 80, 16, "mean"),
]


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv,dim,block_size,zero", GATHERS)
def test_reads_on_a_model_of_the_machine(
    kv: str, dim: int, block_size: int, zero: Any, window: int | None, tmp_path: Path
) -> None:
    """Equal to KVLayout.read bit for bit, from scattered blocks among NaN, and zeros; decodes are not read."""
    from atom.kernels.kv_gather_sm90 import compile_gather

    spec = SPECS[kv]
    if spec is not None and not spec.symmetric:
        spec = replace(spec, zero=zero)
    lengths, counts = (block_size + 3, 70, 2 * block_size, 1), (5, 1, 2, 0)
    case = make_case(spec, lengths, counts, 2, 2, dim, block_size, dtype=torch.bfloat16)
    step, layout = case.step, case.layout
    work = plan_prefill(step, window, block_size)
    assert work is not None
    total = work.num_rows
    firsts = [0 if window is None else max(0, step.seqlens_k[i] - step.counts[i] - window + 1) for i in (0, 2)]
    assert total == sum(step.seqlens_k[i] - first for i, first in zip((0, 2), firsts, strict=True))
    keys, values = np.full((2, total + 7, 2, dim // 2), -1, dtype=np.int32)
    work_tiles = np.concatenate((work.tiles, np.array([[-1, total, 0, 7]], dtype=np.int32)))
    config = GatherConfig(kv, dim, block_size, zero_bias=layout.zero_bias)
    kernel = ptx(compile_gather(config, f"--keep-ptx --dump-dir {tmp_path}"))
    kernel.launch(
        (len(work_tiles), 2),
        config.threads,
        [Argument(case.layer.numpy(), (2,)), Argument(work_tiles, (1,)), Argument(keys, (2,)), Argument(values, (2,))],
    )
    at = 0
    for index, first in zip((0, 2), firsts, strict=True):
        length = int(step.seqlens_k[index])
        tiles = layout.gather(case.layer, layout.tile_rows(step.block_tables[index, : -(-length // block_size)]))
        for part, found in enumerate((keys, values)):
            wanted = layout.read(tiles, part).flatten(1, 2)[:, first:length].transpose(0, 1)
            got = torch.from_numpy(found[at : at + length - first]).view(torch.bfloat16)
            assert torch.equal(got, wanted)
        at += length - first
    assert at == total and not keys[total:].any() and not values[total:].any()


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("kv", SPECS)
def test_machine_code(kv: str, tmp_path: Path) -> None:
    from atom.kernels.kv_gather_sm90 import compile_gather

    compiled = compile_gather(GatherConfig(kv, 128, 16), f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    width = {"int4": "", "int8": r"\.64", "fp8_e4m3": r"\.64", "bf16": r"\.128"}[kv]
    assert len(re.findall(rf"LDG\.E\.NA{width} ", sass)) >= 4 and len(re.findall(r"STG\.E\.128", sass)) == 4
