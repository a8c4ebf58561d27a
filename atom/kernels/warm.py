"""Compile all kernels that a model will run before it runs, in parallel: a warm start finds them and does nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import begin, draw, greedy
from .cache import compile_together, kernel_key, kernel_path
from .gemm import ARCH, LinearSm90, gemm_kernel, gemm_path, token_bucket
from .producers import AddingProducer, QuantizingProducer, producer_kernel, producer_path


@dataclass(frozen=True)
class Kernel:
    """Where a compiled kernel is kept, and the picklable job that puts it there."""

    path: Path
    compile: Callable[[], Any]


DEFAULT_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


def model_kernels(model: nn.Module, dtype: torch.dtype, tokens: Iterable[int] = DEFAULT_TOKENS) -> list[Kernel]:
    """Every GEMM and producer kernel that `model` runs, each once.

    dtype   of the hidden states
    tokens  batch sizes that will occur
    """
    found: dict[Any, Kernel] = {}
    buckets = sorted({token_bucket(count) for count in tokens})
    for module in model.modules():
        for run in (getattr(module, "_run", None), getattr(module, "_add_run", None)):
            if isinstance(run, AddingProducer):
                run = run.producer
            if isinstance(run, LinearSm90):
                for gemm in {run.gemm.config(bucket) for bucket in buckets}:
                    found[gemm] = Kernel(gemm_path(gemm), partial(gemm_kernel, gemm))
            elif isinstance(run, QuantizingProducer):
                gated = run.source in ("silu", "gelu_tanh")  # reads halves of one tensor where its linears are fused
                for strided in {False, gated}:
                    for config in run.configs(dtype, run.features or int(getattr(module, "size", 0)), strided):
                        found[config] = Kernel(producer_path(config), partial(producer_kernel, config))
    return list(found.values())


def step_kernels() -> list[Kernel]:
    """Those that begin a decode step and sample its tokens, whatever the model."""
    found = (
        ("begin_sm90", "begin", begin.begin_kernel),
        ("begin_sm90", "bring", begin.bring_kernel),
        ("greedy_sm90", "greedy", greedy.greedy_kernel),
        ("draw_sm90", "draw", draw.draw_kernel),
    )
    return [Kernel(kernel_path(name, kernel_key(name, config, ARCH)), job) for name, config, job in found]


def warm_up(
    model: nn.Module,
    dtype: torch.dtype,
    tokens: Iterable[int] = DEFAULT_TOKENS,
    workers: int | None = None,
    others: Iterable[Kernel] = (),
) -> int:
    """Compile what is missing, `others` too, with a progress bar on stderr; returns how many kernels that were."""
    kernels = [*others, *model_kernels(model, dtype, tokens)]
    jobs = [kernel.compile for kernel in kernels if not kernel.path.exists()]
    if jobs:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("compiling GPU kernels", total=len(jobs))
            compile_together(jobs, workers, lambda count: progress.update(bar, completed=count))
    return len(jobs)
