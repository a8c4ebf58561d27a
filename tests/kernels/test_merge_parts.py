"""Two attentions merged by their sums: on a CPU, and the kernel's PTX run on one."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.merge_config import MergeConfig
from atom.kernels.merge_parts import Part, merge_into, run

from .machine_code import needs_dsl
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import ptx


def make(dim: int, heads: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of 9 tokens and of 5 of them over other keys, with sums of which some are far apart."""
    generator = torch.Generator().manual_seed(dim)
    out, other = (torch.randn(n, heads, dim, generator=generator).bfloat16() for n in (9, 5))
    sums, other_sums = (3 * torch.randn(heads, n, generator=generator) for n in (9, 5))
    other_sums[0, :2] = torch.tensor([1000.0, -1000.0])
    return out, sums, other, other_sums


def expected(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor, places: Tensor) -> Tensor:
    share = torch.sigmoid((other_sums - sums[:, places]).double()).T[..., None]
    merged = out.double()
    merged[places] = merged[places] + share * (other.double() - merged[places])
    return merged


PLACES = (torch.tensor([7, 0, 3, 8, 4]), torch.arange(2, 7))


@pytest.mark.parametrize("places", PLACES, ids=("indices", "range"))
def test_on_a_cpu(places: Tensor) -> None:
    out, sums, other, other_sums = make(32)
    wanted = expected(out, sums, other, other_sums, places)
    tokens = places if int(places[0]) == 7 else slice(2, 7)
    merge_into(out, sums, Part(tokens, other, other_sums))
    assert float((out.double() - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("places", PLACES, ids=("indices", "range"))
def test_on_a_model_of_the_machine(dim: int, places: Tensor, tmp_path: Path) -> None:
    """Rounded once, and rows that are in no part stay as they are; its CTAs end within a head."""
    from atom.kernels.merge_parts_sm90 import compile_merge

    out, sums, other, other_sums = make(dim)
    wanted, before = expected(out, sums, other, other_sums, places), out.clone()

    def launch(config: MergeConfig, *given: Any) -> None:
        kernel = ptx(compile_merge(config, f"--keep-ptx --dump-dir {tmp_path}"))
        static: tuple[tuple[int, ...], ...] = ((2,), (), (2,), (), ())
        tensors = [x.view(torch.int32) if x.dtype == torch.uint32 else x for x in given if isinstance(x, Tensor)]
        found = [Argument(x.numpy(), dims) for x, dims in zip(tensors, static, strict=False)]
        items = 5 * 3 * config.groups
        kernel.launch((-(-items // config.threads), 1), config.threads, [*found, given[-1]], 1024)

    is_range = int(places[0]) == 2
    run(lambda config: partial(launch, config), out, sums, Part(slice(2, 7) if is_range else places, other, other_sums))
    assert float((out.double() - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())
    error = (out.double() - wanted).abs() / wanted.abs().clamp(min=2.0**-20)
    assert float(error.median()) < 2**-9
    rest = np.setdiff1d(np.arange(9), places.numpy())
    assert torch.equal(out[rest], before[rest])
