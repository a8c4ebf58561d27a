"""Kernels without a GPU: compiled as for one, and the PTX of those for attention run by an emulator."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.kernels import append_sm90, attention_sm90, cascade_sm90, prefill_sm90
from atom.kernels.attention_config import SHARED_BYTES, AppendConfig, DecodeConfig, GatherConfig
from atom.kernels.attention_plan import SEGMENT_FIELDS
from atom.kernels.recent_config import RecentConfig

from .ptx_emulator import Kernel
from .ptx_memory import Tensor as Argument

DECODE_STATIC = {0: (2,), 1: (2,), 7: (2,), 8: (1, 2), 15: (2,)} | dict.fromkeys((6, 9, 11, 12, 13, 14), (1,))
PREFIX_STATIC = {0: (2,), 1: (2,), 3: (1,), 5: (1,), 6: (1, 2), 7: (1,)}
GATHER_STATIC = {0: (2,), 1: (1,), 2: (2,), 3: (2,)}
APPEND_STATIC = {0: (2,), 1: (2,), 2: (2,), 3: (1,), 4: (1,), 6: (1,), 7: (1,), 8: (1,), 9: (2,), 10: (2,), 11: (1, 3)}
RECENT_STATIC = {0: (2,), 1: (1, 3), 5: (2,), 6: (2,)}


def emulated(
    kernel: Kernel, static: dict[int, tuple[int, ...]], sizes: set[int], shape: Callable[..., Any]
) -> Callable[..., None]:
    """A compiled kernel's stand-in: takes its arguments, runs its PTX, writes into the tensors.

    sizes  that constant dimensions may have
    """

    def run(*arguments: Any) -> None:
        grid, threads, shared = shape(*arguments)
        passed = []
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                assert all(argument.shape[dim] in sizes for dim in static.get(index, ())), f"argument {index}"
                signed = argument.view(torch.int32) if argument.dtype == torch.uint32 else argument
                signed = signed.view(torch.int16) if signed.dtype == torch.bfloat16 else signed
                assert signed.is_contiguous()
                passed.append(Argument(signed.numpy(), static.get(index, ())))
            elif argument is not None:  # what a kernel was compiled without
                passed.append(argument)
        kernel.launch(grid, threads, passed, shared)

    return run


@pytest.fixture(autouse=True)
def for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler compiles for: it may have no GPU to ask."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled as ever, and their PTX is run."""
    from atom.kernels.kv_gather_sm90 import compile_gather
    from atom.kernels.paged_decode_sm90 import compile_decode
    from atom.kernels.prefix_decode_sm90 import compile_prefix
    from atom.kernels.recent_decode_sm90 import compile_recent
    from atom.kernels.rope_append_sm90 import compile_append

    options = f"--keep-ptx --dump-dir {tmp_path}"

    @lru_cache
    def decode(config: DecodeConfig) -> Callable[..., None]:
        kernel = Kernel(compile_decode(config, options).__ptx__)  # type: ignore[attr-defined]
        shared = SHARED_BYTES // config.ctas_per_sm
        sizes = {config.head_dim, config.head_dim // 2, config.tile_bytes, config.queries, SEGMENT_FIELDS, 4}
        return emulated(kernel, DECODE_STATIC, sizes, lambda *a: ((len(a[5]) - 1, 1), config.threads, shared))

    @lru_cache
    def prefix(config: DecodeConfig) -> Callable[..., None]:
        kernel = Kernel(compile_prefix(config, options).__ptx__)  # type: ignore[attr-defined]
        shared = SHARED_BYTES // config.ctas_per_sm
        sizes = {config.head_dim, config.head_dim // 2, config.tile_bytes, config.own_queries, SEGMENT_FIELDS}
        sizes.add(config.members)
        return emulated(kernel, PREFIX_STATIC, sizes, lambda *a: ((len(a[4]) - 1, 1), config.threads, shared))

    @lru_cache
    def append(config: AppendConfig) -> Callable[..., None]:
        kernel = Kernel(compile_append(config, options).__ptx__)  # type: ignore[attr-defined]
        threads = 32 * config.warps

        def shape(*a: Any) -> Any:
            return (config.ctas(len(a[0]), a[0].shape[1], a[1].shape[1]), 1), threads, 1024

        sizes = {2, config.head_dim, config.head_dim // 2, config.cache.tile_bytes}
        return emulated(kernel, APPEND_STATIC, sizes, shape)

    @lru_cache
    def recent(config: RecentConfig) -> Callable[..., None]:
        kernel = Kernel(compile_recent(config, options).__ptx__)  # type: ignore[attr-defined]
        sizes = {2, config.head_dim, config.head_dim // 2}

        def shape(*a: Any) -> Any:
            return (-(-len(a[4]) * a[1].shape[2] // config.rows), 1), 32 * config.warps, config.shared_bytes

        return emulated(kernel, RECENT_STATIC, sizes, shape)

    @lru_cache
    def gather(config: GatherConfig) -> Callable[..., None]:
        kernel = Kernel(compile_gather(config, options).__ptx__)  # type: ignore[attr-defined]
        sizes = {4, config.head_dim // 2, config.cache.tile_bytes}
        return emulated(kernel, GATHER_STATIC, sizes, lambda *a: ((len(a[1]), a[0].shape[1]), config.threads, 1024))

    monkeypatch.setattr(prefill_sm90, "gather_kernel", gather)
    monkeypatch.setattr(attention_sm90, "decode_kernel", decode)
    monkeypatch.setattr(attention_sm90, "recent_kernel", recent)
    monkeypatch.setattr(append_sm90, "append_kernel", append)
    monkeypatch.setattr(cascade_sm90, "prefix_kernel", prefix)
    monkeypatch.setattr(cascade_sm90, "has_prefix_kernel", lambda config: True)
    monkeypatch.setattr(attention_sm90, "multiprocessors", lambda device: 2)  # six CTAs: rows are split
