"""Compile all kernels that a model will run before it runs, in parallel: a warm start finds them and does nothing."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from .cache import compile_together
from .gemm import LinearSm90, gemm_kernel, gemm_path, token_bucket
from .producers import QuantizingProducer, producer_kernel, producer_path

DEFAULT_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def missing_kernels(
    model: nn.Module, dtype: torch.dtype, tokens: Iterable[int] = DEFAULT_TOKENS
) -> list[Callable[[], Any]]:
    """Jobs for compile_together: one for each kernel of `model` that is not in the cache yet.

    A gated producer learns its width from its first input, so its kernel (a second) is compiled then.

    dtype   of the hidden states
    tokens  batch sizes that will occur
    """
    jobs: dict[Any, Callable[[], Any]] = {}
    buckets = sorted({token_bucket(count) for count in tokens})
    for module in model.modules():
        run = getattr(module, "_run", None)
        if isinstance(run, LinearSm90):
            for config in {run.gemm.config(bucket) for bucket in buckets}:
                if not gemm_path(config).exists():
                    jobs[config] = partial(gemm_kernel, config)
        elif isinstance(run, QuantizingProducer):
            features = run.features
            if features and not producer_path(run.config(dtype, features)).exists():
                jobs[run.config(dtype, features)] = partial(producer_kernel, run.config(dtype, features))
    return list(jobs.values())


def warm_up(
    model: nn.Module, dtype: torch.dtype, tokens: Iterable[int] = DEFAULT_TOKENS, workers: int | None = None
) -> int:
    """Compile what is missing, with a progress bar; returns how many kernels that were."""
    jobs = missing_kernels(model, dtype, tokens)
    if jobs:
        from rich.progress import Progress

        with Progress(transient=True) as progress:
            bar = progress.add_task("compiling GPU kernels", total=len(jobs))
            compile_together(jobs, workers, lambda count: progress.update(bar, completed=count))
    return len(jobs)
