"""`atom bench kernels --op paged_attention` without a GPU: cells, bounds, what would run."""

from dataclasses import replace

import numpy as np
import pytest

from atom.kernels.bench import bench_kernels, records, table
from atom.kernels.bench_attention import CELLS, FORMATS, Shape, layout_of, read_bytes
from atom.kernels.bench_config import KernelsConfig


def test_bounds_are_the_bytes_of_codes_and_words() -> None:
    shape = Shape(64, 1024)
    assert read_bytes(layout_of("int4", shape), shape) == 64 * 1024 * 34816 // 32
    assert read_bytes(layout_of("bf16", shape), shape) == 64 * 1024 * 4096
    assert read_bytes(layout_of("int4", shape), replace(shape, window=256)) == 64 * 256 * 1088
    assert read_bytes(layout_of("int4", shape), replace(shape, shared=512)) == (512 + 64 * 512) * 1088
    exact = replace(shape, recent=16)
    assert read_bytes(layout_of("int4", exact), exact) == 64 * (1008 * 1088 + 16 * 4096)
    ragged = Shape(128, "ragged").lengths()
    assert (
        1300 < ragged.mean() < 1700 and ragged.max() <= 32768 and np.array_equal(ragged, Shape(128, "ragged").lengths())
    )


def test_every_cell_says_what_would_run() -> None:
    rows = bench_kernels(KernelsConfig(op="paged_attention"))
    assert len(rows) == len(CELLS) * len(FORMATS) - sum(shape.has_offset for shape in CELLS)
    assert all(row["us"] is None and row["sol_us"] > 1 and row["runs"] == "paged_decode_sm90" for row in rows)
    assert "16.28" in table(rows) and not any(records(rows).values())


def test_what_it_cannot_write_is_refused() -> None:
    with pytest.raises(ValueError, match="its record is written by python -m benchmarks"):
        KernelsConfig(op="paged_attention", machine="h200")
