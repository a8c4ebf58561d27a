"""The options of `atom bench kernels`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..quant.presets import PRESETS, get_scheme
from .bounds import GPUS


@dataclass(frozen=True)
class KernelsConfig:
    """Microseconds of every op and implementation beside the least that bytes and operations take; without a GPU only
    that, and what would run.

    Example: atom bench kernels --op linear --scheme w4a8 --tokens 1 64 1024
    """

    op: Literal[
        "all",
        "linear",
        "rms_norm_quantize",
        "add_rms_norm_quantize",
        "permute_quantize",
        "gated_quantize",
        "paged_attention",
    ] = "all"
    """The op to measure; `all` are those of the linear layers. Attention has batches and caches of its own."""

    gpu: str = "h200"
    """Whose speed of light: h100 or h200. Kernels run on the GPU that is there."""

    scheme: tuple[str, ...] = tuple(name for name in PRESETS if name not in ("bf16", "w3a3"))
    """Presets to measure."""

    tokens: tuple[int, ...] = (1, 16, 64, 128, 256, 1024, 8192)
    """Batch sizes M."""

    flashinfer_trace: Path | None = None
    """Write each op as FlashInfer-Trace definition, solution, workloads and, where it ran, traces to this directory."""

    machine: str | None = None
    """Write the records `gemm` and `producers` under benchmarks/results/MACHINE."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"unknown --gpu {self.gpu!r}; use one of {', '.join(GPUS)}")
        if self.op == "paged_attention" and self.machine is not None:
            raise ValueError(
                "the record of paged_attention comes from another command, got --machine; leave it out, its record is "
                "written by python -m benchmarks.bench_attention."
            )
        for name in self.scheme:
            if get_scheme(name).weight is None:
                raise ValueError(f"scheme {name} has no low-bit kernels; use one of {', '.join(PRESETS)} but bf16")
        if any(count < 1 for count in self.tokens):
            raise ValueError(f"--tokens are at least 1, got {min(self.tokens)}; use 1 16 64, say")
