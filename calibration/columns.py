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
from atom.quant.rounding import MSE_RATIOS, Scale, choose_scale, decode, encode
from atom.quant.schemes import TensorSpec


@dataclass(frozen=True)
class Block:
    """Columns that are rounded together, and the scales that they get.

    W       [n, N] float32, the transposed block; spent
    R       [n, n] float32, the block of the unit Cholesky factor of the inverse Hessian
    spec    granularity channel: one scale a row; None keeps bf16
    group   choose new scales from the updated columns at each multiple of `group`; None uses `scale`
    scale   scales [N, 1] for all columns of the block, where they were chosen before
    outer   outer scales [N, 1] that chosen scales lie under, or None
    cost    [n], what a unit of squared error in each column costs (see gptq.inverse_factor): groups that search their
            clip try every one with GPTQ's feedback; None: by rounding error alone
    """

    W: Tensor
    R: Tensor
    spec: TensorSpec | None
    group: int | None = None
    scale: Scale | None = None
    outer: Tensor | None = None
    cost: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What two blocks that run the same kernels have in common."""
        return (self.W.shape, self.W.device, self.spec, self.group, tuple(part is not None for part in self._parts))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that there are, in an order that blocks of a kind share."""
        return [self.W, self.R, *(part for part in self._parts if part is not None)]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        scale = self.scale
        of_scale = (None, None, None) if scale is None else (scale.scale, scale.zero_point, scale.outer)
        return (self.outer, self.cost, *of_scale)

    def copy(self) -> "Block":
        """The same in memory of its own."""
        outer, cost = (None if part is None else part.clone() for part in (self.outer, self.cost))
        scale = None if self.scale is None else _copy(self.scale)
        return replace(self, W=self.W.clone(), R=self.R.clone(), scale=scale, outer=outer, cost=cost)


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


def round_columns(block: Block) -> Rounded:
    """Round the columns of a block in order."""
    W, R, spec, group = block.W, block.R, block.spec, block.group
    n, rows = W.shape
    dtype = torch.bfloat16 if spec is None else get_format(spec.format).dtype
    if spec is not None and not spec.symmetric:
        dtype = torch.uint8
    codes = torch.empty(n, rows, dtype=dtype, device=W.device)
    error = torch.empty_like(W)
    scales: list[Scale] = []
    applied = None if block.scale is None else _fold(block.scale)
    for j in range(n):
        if group is not None and j % group == 0 and spec is not None:
            columns = slice(j, min(j + group, n))
            if block.cost is not None and spec.clip == "mse":
                cost = block.cost[columns]
                scales.append(choose_with_feedback(W[columns], R[columns, columns], cost, spec, block.outer))
            else:
                scales.append(choose_scale(W[columns].T, spec, block.outer))
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


def choose_with_feedback(W: Tensor, R: Tensor, cost: Tensor, spec: TensorSpec, outer: Tensor | None) -> Scale:
    """The scales [N, 1] of one group under which GPTQ's own loop over it loses least.

    W [n, N], R [n, n], cost [n] as in Block. For every row and clip r in MSE_RATIOS the columns are
    rounded with feedback, and sum_j cost_j e_j^2 is what the linear's output error grows by if all later columns make
    up for it as well as they can (GPTQ, arXiv:2210.17323, equation 2). Ties go to the larger clip.
    """
    n, rows = W.shape
    trials = [choose_scale(W.T, replace(spec, clip=ratio), outer) for ratio in MSE_RATIOS]
    zeros = [trial.zero_point for trial in trials if trial.zero_point is not None]
    applied = Scale(torch.cat([trial.effective for trial in trials]), torch.cat(zeros) if zeros else None)
    columns = W.repeat(1, len(trials))  # [n, trials * N]
    lost = torch.zeros_like(columns[0])
    for j in range(n):
        value = decode(encode(columns[j].unsqueeze(1), applied, spec), applied, spec).squeeze(1)
        error = columns[j] - value
        lost += error.square() * cost[j]
        columns[j + 1 :].addcmul_(R[j, j + 1 :, None], error, value=-1.0)
    best = lost.view(len(trials), rows).argmin(0, keepdim=True)  # [1, N]

    def pick(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.squeeze(1) for part in parts]).gather(0, best).T.contiguous()

    return Scale(pick([trial.scale for trial in trials]), pick(zeros) if zeros else None, trials[0].outer)


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


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    block: Block
    result: Rounded


class ColumnRounder:
    """`round_columns`, recorded per shape on a GPU. Keep one for a whole model: layers repeat their shapes."""

    def __init__(self) -> None:
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, block: Block) -> Rounded:
        """As round_columns; the block is left alone on a GPU."""
        if not block.W.is_cuda:
            with _one_thread():
                return round_columns(block)
        if block.kind not in self._recordings:
            self._recordings[block.kind] = _record(block)
        recording = self._recordings[block.kind]
        for static, tensor in zip(recording.block.tensors, block.tensors, strict=True):
            static.copy_(tensor)
        recording.graph.replay()
        result = recording.result
        return replace(result, scales=[_copy(s) for s in result.scales])


def _record(block: Block) -> _Recording:
    """Capture round_columns on a copy of the block, after one plain run that loads the kernels."""
    static, device = block.copy(), block.W.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        round_columns(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = round_columns(static)
    return _Recording(graph, static, result)


def _copy(scale: Scale) -> Scale:
    """The scales in memory of their own."""
    zero, outer = scale.zero_point, scale.outer
    return Scale(scale.scale.clone(), None if zero is None else zero.clone(), None if outer is None else outer.clone())
