"""The kernel that begins a decode step, against torch: its PTX run on a CPU, and itself on a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.begin import Begin, refuses_begin
from atom.kernels.begin_config import BLOCKS, NEWEST, RECORD_WORDS, RING
from atom.kernels.host_memory import HostRing, bring
from atom.kernels.registry import Problem

from .ptx_memory import Address
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import needs_dsl, ptx

HIDDEN, HALF, MOST, MAX_BLOCKS = 2 * 8 * 256 + 40, 24, 7, 300


def step() -> tuple[np.ndarray, np.ndarray]:
    """Records and tables of five decodes; tables wider than the kernel has threads, one of a single block."""
    records = np.array(
        [
            # token, source, position, blocks, slot, lane, newest, ring
            [3, -1, 0, 1, 16, 4, 0, 96],
            [0, 2, 100000, 290, 4711, 2, 0, 0],
            [9, -1, 77, 256, 5, 0, 0, ~500],
            [0, 0, 4095, 257, 2**31 - 1, 1, 0, 2**20],
            [1, -1, 12, 2, 0, 3, 0, ~0],
        ],
        dtype=np.int32,
    )
    records = np.pad(records, ((0, 0), (0, RECORD_WORDS - records.shape[1])))
    return records, np.arange(5 * 290, dtype=np.int32).reshape(5, 290)


def made(device: str, scale: float, window: tuple[int, int] = (0, 0)) -> Begin:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(10, HIDDEN, generator=generator).bfloat16()
    frequencies = [10000.0 ** -(torch.arange(HALF) / HALF), 5e5 ** -(torch.arange(HALF) / HALF)]
    last = torch.tensor([7, 0, 5, 0, 0])
    return Begin(embedding.to(device), scale, frequencies, [1.0, 0.5], last.to(device), MOST, MAX_BLOCKS, 2, window)


def check(begin: Begin, scale: float, atol: float, records: np.ndarray, tables: np.ndarray) -> None:
    """What a step's buffers must hold."""
    tokens = torch.tensor([3, 5, 9, 7, 1], device=begin.hidden.device)
    assert torch.equal(begin.hidden[:5], begin.embedding[tokens] * scale) and not begin.hidden[5:].any()
    positions, slots, lanes = (torch.from_numpy(records[:, i]).long() for i in (2, 4, 5))
    assert torch.equal(begin.ids[:3, :5].cpu(), torch.stack((positions, slots, lanes)))
    if begin.window[0]:  # in lines, 77 is the last of sixteen tokens, 12 the thirteenth of its text
        assert begin.exact_slots[:5].tolist() == [96, 100000 % 24, 515, 2**20 + 4095 % 24, 12]
        assert begin.rings[:5].tolist() == records[:, RING].tolist()
    else:
        assert not begin.exact_slots.any() and not begin.rings.any()
    angles = positions.to(begin.hidden.device).float()[:, None] * begin.frequencies[:, None]
    for found, function in zip(begin.turns[:, :, :5], (torch.cos, torch.sin), strict=True):
        assert torch.allclose(found, function(angles) * begin.factors[:, None, None], atol=atol, rtol=0)
    assert (begin.lengths[:5] == positions.to(begin.lengths.device) + 1).all() and not begin.lengths[5:].any()
    for row, blocks in enumerate(records[:, 3].tolist()):
        assert begin.tables[row, :blocks].tolist() == tables[row, :blocks].tolist()


def grow(records: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next step's records without tables, two of which have a block more; and what the tables are then."""
    later, tables = records.copy(), np.pad(tables, ((0, 0), (0, 1)))
    later[:, NEWEST] = tables[range(5), records[:, BLOCKS] - 1]
    later[[0, 3], BLOCKS] += 1
    later[[0, 3], NEWEST] = 77, 78
    tables[0, 1], tables[3, 257] = 77, 78
    return later, tables


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize(("scale", "window"), [(1.0, (0, 0)), (3.5, (16, 24))])
def test_buffers_on_a_model_of_the_machine(scale: float, window: tuple[int, int], tmp_path: Path) -> None:
    from atom.kernels.begin_sm90 import compile_begin

    begin = made("cpu", scale, window)

    def bits(x: Tensor) -> Argument:
        return Argument((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy())

    kernel = ptx(compile_begin(f"--keep-ptx --dump-dir {tmp_path}"))

    def launch(records: np.ndarray, tables: np.ndarray | None) -> None:
        begin.room(5)[...] = records
        begin.place(begin.host[begin.turn].numpy()[: records.size], tables)
        host, count = begin.host[begin.turn].numpy(), 0 if tables is None else tables.size
        halves = (host[: records.size], host[records.size : records.size + max(1, count)].copy())
        kernel.launch(
            (5, 1),
            256,
            [
                *map(Address, halves),
                0 if tables is None else tables.shape[1],
                bits(begin.last_tokens),
                bits(begin.embedding),
                scale,
                bits(begin.frequencies),
                bits(begin.factors),
                bits(begin.hidden[:5]),
                Argument(begin.turns.numpy(), (0,)),
                Argument(begin.ids.numpy(), (0,)),
                bits(begin.lengths),
                bits(begin.tables),
                bits(begin.rings),
                *begin.window,
            ],
        )

    records, tables = step()
    launch(records, tables)
    check(begin, scale, 1e-6, records, tables)
    later, tables = grow(records, tables)
    launch(later, None)
    check(begin, scale, 1e-6, later, tables)


@needs_dsl
@pytest.mark.slow
def test_bring_on_a_model_of_the_machine(tmp_path: Path) -> None:
    from atom.kernels.begin_sm90 import compile_bring

    source, target = np.arange(1, 1037, dtype=np.int32), np.zeros(1036, dtype=np.int32)
    kernel = ptx(compile_bring(f"--keep-ptx --dump-dir {tmp_path}"))
    kernel.launch((2, 1), 256, [Address(source), Argument(target)])
    assert np.array_equal(source, target)


def test_what_it_refuses() -> None:
    assert refuses_begin(Problem("sm_90", K=4096)) is None
    assert "cpu" in (refuses_begin(Problem("cpu", K=4096)) or "")
    assert "multiple of 8" in (refuses_begin(Problem("sm_90", K=100)) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("scale", "window"), [(1.0, (0, 0)), (3.5, (16, 24))])
def test_buffers_on_a_gpu(scale: float, window: tuple[int, int]) -> None:
    """Angles are those of torch bit by bit: keys are stored turned by either."""
    begin = made("cuda", scale, window)
    records, tables = step()
    begin.room(5)[...] = records
    begin(records, tables)
    torch.cuda.synchronize()
    check(begin, scale, 0.0, records, tables)
    later, tables = grow(records, tables)
    begin.room(5)[...] = later
    begin(later, None)
    torch.cuda.synchronize()
    check(begin, scale, 0.0, later, tables)
    words, source = torch.zeros(4096, dtype=torch.int32, device="cuda"), torch.arange(4096, dtype=torch.int32)
    pinned = source.pin_memory()
    bring(pinned, words)
    assert torch.equal(words.cpu(), source)
    ring = HostRing(2)
    first, second, third = (ring.take(size) for size in (100, 5000, 40))
    assert (len(first), len(second), len(third)) == (100, 5000, 40)
    assert first.is_pinned() and first.data_ptr() == third.data_ptr() != second.data_ptr()
