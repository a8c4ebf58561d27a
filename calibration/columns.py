"""The inner loop of GPTQ: round a block of columns one by one, each making the rest of the block pay for its error.

On a GPU a column is a dozen tiny kernels, and launching them takes longer than they run: the loop over a block is
recorded once per shape as a CUDA graph and replayed. The recording is the plain function below, nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atom.quant.formats import get_format
from atom.quant.rounding import Scale, choose_scale, decode, encode
from atom.quant.schemes import TensorSpec


@dataclass(frozen=True)
class Rounded:
    """A block of n columns after rounding; on a GPU valid until the next block of this shape.

    codes    [n, N] in the format's dtype (bfloat16 values where the columns keep bf16)
    error    [n, N] float32, what each column missed its code by when its turn came
    scales   those chosen within the block, in order, each tensor [N, 1]
    """

    codes: Tensor
    error: Tensor
    scales: list[Scale]


def round_columns(
    W: Tensor, R: Tensor, spec: TensorSpec | None, group: int | None, scale: Scale | None, outer: Tensor | None
) -> Rounded:
    """Round the columns of a block in order.

    W       [n, N] float32, the transposed block; spent
    R       [n, n] float32, the block of the unit Cholesky factor of the inverse Hessian
    spec    granularity channel: one scale a row; None keeps bf16
    group   choose new scales from the updated columns at each multiple of `group`; None uses `scale`
    scale   scales [N, 1] for all columns of the block, where they were chosen before
    outer   outer scales [N, 1] that chosen scales lie under, or None
    """
    n, rows = W.shape
    dtype = torch.bfloat16 if spec is None else get_format(spec.format).dtype
    if spec is not None and not spec.symmetric:
        dtype = torch.uint8
    codes = torch.empty(n, rows, dtype=dtype, device=W.device)
    error = torch.empty_like(W)
    scales: list[Scale] = []
    applied = None if scale is None else _fold(scale)
    for j in range(n):
        if group is not None and j % group == 0 and spec is not None:
            scales.append(choose_scale(W[j : j + group].T, spec, outer))
            applied = _fold(scales[-1])
        w = W[j].unsqueeze(1)  # [N, 1]
        if spec is None:
            code = w.to(torch.bfloat16)
            value = code.float()
        else:
            assert applied is not None
            code = encode(w, applied, spec)
            value = decode(code, applied, spec)
        codes[j] = code.squeeze(1)
        torch.sub(W[j], value.squeeze(1), out=error[j])
        W[j + 1 :].addcmul_(R[j, j + 1 :, None], error[j], value=-1.0)
    return Rounded(codes, error, scales)


def _fold(scale: Scale) -> Scale:
    """The same scales with the outer one multiplied in once, not at every column."""
    return replace(scale, scale=scale.effective, outer=None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A column is microseconds of work: waking other threads costs as much, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Rounded


class ColumnRounder:
    """`round_columns`, recorded per shape on a GPU. Keep one for a whole model: layers repeat their shapes."""

    def __init__(self) -> None:
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(
        self,
        W: Tensor,
        R: Tensor,
        spec: TensorSpec | None,
        group: int | None,
        scale: Scale | None,
        outer: Tensor | None,
    ) -> Rounded:
        """As round_columns; W is left alone on a GPU."""
        if not W.is_cuda:
            with _one_thread():
                return round_columns(W, R, spec, group, scale, outer)
        given = [W, R, outer, *((scale.scale, scale.zero_point, scale.outer) if scale is not None else ())]
        key = (W.shape, W.device, spec, group, tuple(t is not None for t in given))
        if key not in self._recordings:
            self._recordings[key] = _record(W, R, spec, group, scale, outer)
        recording = self._recordings[key]
        for static, tensor in zip(recording.inputs, [t for t in given if t is not None], strict=True):
            static.copy_(tensor)
        recording.graph.replay()
        result = recording.result
        return replace(result, scales=[_map(s) for s in result.scales])


def _record(
    W: Tensor, R: Tensor, spec: TensorSpec | None, group: int | None, scale: Scale | None, outer: Tensor | None
) -> _Recording:
    """Capture round_columns on copies of its inputs, after one plain run that loads the kernels."""
    static_W, static_R = W.clone(), R.clone()
    static_outer = None if outer is None else outer.clone()
    static_scale = None if scale is None else _map(scale)
    stream = torch.cuda.Stream(W.device)
    stream.wait_stream(torch.cuda.current_stream(W.device))
    with torch.cuda.stream(stream):
        round_columns(static_W, static_R, spec, group, static_scale, static_outer)
    torch.cuda.current_stream(W.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = round_columns(static_W, static_R, spec, group, static_scale, static_outer)
    inputs = [static_W, static_R, static_outer]
    if static_scale is not None:
        inputs += [static_scale.scale, static_scale.zero_point, static_scale.outer]
    return _Recording(graph, [t for t in inputs if t is not None], result)


def _map(scale: Scale) -> Scale:
    """A copy of the scales in memory of their own."""
    zero, outer = scale.zero_point, scale.outer
    return Scale(scale.scale.clone(), None if zero is None else zero.clone(), None if outer is None else outer.clone())
