"""Attention of the same queries over some keys and over others, merged into one by their sums of exponentials."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cache import load_kernel
from .merge_config import MergeConfig


@dataclass(frozen=True)
class Part:
    """What attention over some keys gave: for which tokens, the result, and its sums.

    out   [n, num_heads, head_dim]
    sums  float32 [num_heads, n]: logarithms of the sums of exponentials of scores; None where nobody wants them
    """

    tokens: slice | Tensor
    out: Tensor
    sums: Tensor | None


def merge_into(out: Tensor, sums: Tensor, part: Part) -> None:
    """Have `out` [T, num_heads, head_dim], whose sums are [num_heads, T], take a part over other keys in.

    In float32, rounded once. On a GPU `out` is contiguous, bfloat16.
    """
    assert part.sums is not None
    if out.device.type == "cuda":
        run(merge_kernel, out, sums, part)
        return
    share = torch.sigmoid(part.sums - sums[:, part.tokens]).T[..., None]  # of the other keys
    out[part.tokens] = torch.lerp(out[part.tokens].float(), part.out.float(), share).to(out.dtype)


def run(kernel: Any, out: Tensor, sums: Tensor, part: Part) -> None:
    """merge_into by the kernel that `kernel` gives for a config."""
    assert part.sums is not None and out.is_contiguous()
    places, first = None, 0
    if isinstance(part.tokens, slice):
        first = part.tokens.indices(len(out))[0]
    else:
        places = part.tokens
    kernel(MergeConfig(out.shape[2], places is not None))(
        _words(out), sums.contiguous(), _words(part.out.contiguous()), part.sums.contiguous(), places, first
    )


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32).view(torch.uint32)


@lru_cache(None)
def merge_kernel(config: MergeConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .merge_parts_sm90 import compile_merge

        return compile_merge(config)

    return load_kernel("merge_parts_sm90", config, compile, "sm_90a")
