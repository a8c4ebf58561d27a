"""The producers of a scheme against the same in torch, and against the bytes that they read and write."""

from functools import partial
from typing import Any

import torch

from ..quant.schemes import LinearScheme
from .activation import permute_quantize_reference
from .gated import gated_quantize_reference
from .gemm import activation_columns, takes_bf16, token_scales
from .norm import add_rms_norm_quantize_reference, rms_norm_quantize_reference
from .producer_config import FEW_TOKENS
from .producers import AddingProducer, QuantizingProducer
from .timing import time_calls

SOURCES = {
    "rms_norm_quantize": "norm",
    "add_rms_norm_quantize": "add_norm",
    "permute_quantize": "plain",
    "gated_quantize": "silu",
}
ROTATE_BYTES = 200_000_000


def make_producer(op: str, linear: LinearScheme, hidden: int, device: str) -> QuantizingProducer:
    """The producer of `op`, with a random permutation where the scheme has one, and a random gain."""
    source = SOURCES[op]
    perm = torch.randperm(hidden, device=device) if linear.reorder and source != "silu" else None
    gain = torch.rand(hidden, device=device) if "norm" in source else None
    return QuantizingProducer(source, linear, perm, gain, 1e-5)


def producer_bytes(op: str, linear: LinearScheme, M: int, hidden: int) -> int:
    """Bytes that have to be read and written for M tokens of `hidden` features, 16-bit inputs."""
    reads = 2 * hidden * (2 if op in ("gated_quantize", "add_rms_norm_quantize") else 1)
    writes = 2 * hidden if op == "add_rms_norm_quantize" else 0
    columns, _, units = activation_columns(linear, hidden)
    writes += 2 * hidden if takes_bf16(linear) else columns
    writes += 4 * {"group": units, "token": 1, "none": 0}[token_scales(linear)]
    return M * (reads + writes)


def producer_us(op: str, linear: LinearScheme, M: int, hidden: int) -> dict[str, float]:
    """Median microseconds: "ours", and "torch", the reference run eagerly on the GPU.

    Inputs come from memory; of few tokens there is also "l2", with inputs that still lie in L2, as those do that a GEMM
    has just written.
    """
    made = make_producer(op, linear, hidden, "cuda")
    run = AddingProducer(made) if op == "add_rms_norm_quantize" else made
    inputs = 1 if op in ("rms_norm_quantize", "permute_quantize") else 2
    copies = min(64, max(2, ROTATE_BYTES // (M * 2 * hidden * inputs)))
    x = [[torch.randn(M, hidden, device="cuda").bfloat16() for _ in range(inputs)] for _ in range(copies)]
    count = max(copies, 64 if M <= 256 else 12)  # a graph's first launch has none in front to start behind
    plain = reference(op, linear, made)
    candidates = {
        "ours": [partial(run, *x[i % copies]) for i in range(count)],
        "torch": [partial(plain, *x[i % copies]) for i in range(8 if M <= 256 else 2)],
    }
    if M <= FEW_TOKENS:
        candidates["l2"] = [partial(run, *x[i % 4]) for i in range(count)]
    return time_calls(candidates)


def reference(op: str, linear: LinearScheme, run: QuantizingProducer) -> Any:
    """The torch reference of `op` with the permutation and gain of a producer."""
    perm = None if run.perm is None else run.perm.long()
    if op == "gated_quantize":
        return gated_quantize_reference(linear, "silu")
    if op == "permute_quantize":
        return permute_quantize_reference(linear, perm)
    assert run.gain is not None
    build = rms_norm_quantize_reference if op == "rms_norm_quantize" else add_rms_norm_quantize_reference
    return build(linear, perm, run.gain, run.eps)
