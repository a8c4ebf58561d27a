"""GPTQ: round a weight column by column and let the columns not yet rounded make up for the error.

A pure function of weights and one Hessian. Columns are taken in the order they stand in, which calibration has made
ascending in energy where a scheme reorders: the error flows towards the outlier channels, which are rounded last and to
a finer format, and the static order replaces GPTQ's act-order. Where channels stay in their own order, `act_order`
takes the loudest columns of each group first; what is stored does not change its order. All rounding is that of
atom.quant; here is only the order of events.
The weight is transposed, so that one column over all rows is contiguous.

Source: Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1; groups and outliers as in Atom, arXiv:2310.19102.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atom.errors import CalibrationError
from atom.quant.granularity import Channel
from atom.quant.granularity import Tensor as PerTensor
from atom.quant.mixed import MixedWeight
from atom.quant.rotation import rotate
from atom.quant.rounding import Quantized, Scale, choose_scale
from atom.quant.schemes import LinearScheme, TensorSpec

from .columns import Block, ColumnRounder
from .config import ScaleSearch

log = logging.getLogger(__name__)

BLOCK_COLUMNS = 128
MAX_DAMPING = 10.0  # of the mean diagonal: a Hessian that needs more says nothing about the weights


def gptq(
    weights: Sequence[Tensor],
    hessian: Tensor,
    linear: LinearScheme,
    damping: float = 0.01,
    name: str = "weight",
    rounder: ColumnRounder | None = None,
    scale_search: ScaleSearch = "rounding",
    act_order: bool = False,
) -> list[MixedWeight]:
    """Quantize the weights of linears that share an input, their rows stacked.

    weights   each [N_i, K] float, columns permuted: normal columns, then outliers; not yet rotated
    hessian   [K, K] float32, 2/n sum x x^T of what the linears take (permuted, rotated, rounded); overwritten
    linear    the scheme of all of them
    damping   share of the mean diagonal added to the diagonal, tenfold again whenever Cholesky fails
    rounder   keeps recorded column steps from call to call (CUDA graphs); made anew if None
    scale_search  where clips are searched: by rounding error, or by the loss of GPTQ's loop over the group
    act_order     within every group of normal columns, those of the largest inputs first
    Raises ValueError on a weight that holds NaN or infinity, CalibrationError where no damping up to 10 helps.
    """
    assert linear.weight is not None
    sizes = [w.shape[0] for w in weights]
    W = _stack(weights, linear, name)  # [K, N]
    normal, outliers = linear.split(W.shape[0])
    whole = _whole_scales(W[:normal], sizes, linear.weight)
    W[hessian.diagonal() == 0] = 0.0  # dead columns
    order = loudest_first(hessian.diagonal(), normal, linear.weight.group_size) if act_order else None
    if order is not None:
        W, hessian = W[order], hessian[order][:, order]
    with exact_float32():
        factor, cost = inverse_factor(hessian, damping, name)
        run = _Run(W, factor, rounder or ColumnRounder(), cost if scale_search == "feedback" else None)
        codes, scale = run.round_normal(normal, linear.weight, whole, sizes)
        outlier_codes, outlier_scale = run.round_outliers(normal, linear) if outliers else (None, None)
    if order is not None:
        codes = codes[order[:normal].argsort()]
    parts = []
    for i, rows in enumerate(_row_slices(sizes)):
        own = _rows_of(scale, rows)
        if whole:
            per_tensor = isinstance(linear.weight.granularity, PerTensor)
            own = whole[i] if per_tensor else replace(own, outer=whole[i].outer)
        quantized = Quantized(codes[:, rows].T.contiguous(), own)
        outlier: Quantized | Tensor | None = None
        if outlier_codes is not None:
            outlier = outlier_codes[:, rows].T.contiguous()
            if outlier_scale is not None:
                outlier = Quantized(outlier, _rows_of(outlier_scale, rows))
        parts.append(MixedWeight(quantized, outlier))
    return parts


@dataclass
class _Run:
    """One pass over the columns of W [K, N] under the factor R [K, K]."""

    W: Tensor
    R: Tensor
    rounder: ColumnRounder
    cost: Tensor | None

    def round_normal(self, normal: int, spec: TensorSpec, whole: list[Scale], sizes: list[int]) -> tuple[Tensor, Scale]:
        """Codes [normal, N] and scales [N, groups] of the first columns."""
        by_row = replace(spec, granularity=Channel())
        fixed = _spread(whole, sizes) if whole else None
        if isinstance(spec.granularity, PerTensor):
            return self._round(0, normal, by_row, normal, fixed, None)
        outer = None if fixed is None else fixed.outer
        return self._round(0, normal, by_row, spec.group_size or normal, None, outer)

    def round_outliers(self, normal: int, linear: LinearScheme) -> tuple[Tensor, Scale | None]:
        """Codes [outliers, N] (or bfloat16 values) and scales [N, 1] of the last columns."""
        spec = linear.outliers.spec(Channel(), dynamic=False)
        codes, scale = self._round(normal, len(self.W), spec, len(self.W) - normal, None, None)
        return codes, None if spec is None else scale

    def _round(
        self, first: int, last: int, spec: TensorSpec | None, size: int, fixed: Scale | None, outer: Tensor | None
    ) -> tuple[Tensor, Scale]:
        """Round columns first..last with a scale for each `size` of them, chosen from their updated values."""
        codes, scales, scale = [], [] if fixed is None else [fixed], fixed
        for start, stop in blocks(first, last, size):
            refresh = size if size <= BLOCK_COLUMNS and fixed is None else None
            if refresh is None and fixed is None and spec is not None and (start - first) % size == 0:
                scale = choose_scale(self.W[start : min(start + size, last)].T, spec, outer)
                scales.append(scale)
            block = Block(self.W[start:stop], self.R[start:stop, start:stop], spec, scale=scale)
            if refresh is not None:
                cost = None if self.cost is None else self.cost[start:stop]
                block = replace(block, group=refresh, scale=None, outer=outer, cost=cost)
            rounded = self.rounder(block)
            codes.append(rounded.codes.clone())
            scales += rounded.scales
            self.W[stop:].addmm_(self.R[start:stop, stop:].T, rounded.error, alpha=-1.0)
        return torch.cat(codes), _join(scales)


def loudest_first(diagonal: Tensor, normal: int, size: int | None) -> Tensor:
    """Columns int64 [K] in descending order of `diagonal` within each group of `size` normal ones; the rest behind."""
    size = size or max(1, normal)
    groups = [columns[diagonal[columns].argsort(descending=True, stable=True)] for columns in
              torch.arange(normal, device=diagonal.device).split(size)]  # fmt: skip
    return torch.cat([*groups, torch.arange(normal, len(diagonal), device=diagonal.device)])


def blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut columns first..last into blocks of about 128 that hold whole groups of `size`, or lie within one."""
    step = BLOCK_COLUMNS // size * size if size <= BLOCK_COLUMNS else BLOCK_COLUMNS
    start = first
    while start < last:
        end_of_group = last if size <= BLOCK_COLUMNS else first + ((start - first) // size + 1) * size
        stop = min(start + step, end_of_group, last)
        yield start, stop
        start = stop


def inverse_factor(H: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """The damped H^-1 = U^T U as R [K, K], which is U over its diagonal, and cost [K] = 1 / diag(U)^2.

    R is upper triangular with a unit diagonal; an error e in column j costs cost_j e^2 once all later columns have
    made up for it as well as they can.

    With J the reversal and J H J = L L^T, U = J L^-1 J: one factorisation and one triangular inverse, and the
    inverse of H itself is never formed. Channels that never fire get the mean of the others. H is overwritten.
    """
    diagonal = H.diagonal().clone()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    diagonal[~live] = mean
    while True:
        H.diagonal().copy_(diagonal + damping * mean)
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()):
            break
        del L
        if damping * 10 > MAX_DAMPING * 1.001:
            raise CalibrationError(
                f"the Hessian of {name} is not positive definite even with damping {damping:g}; GPTQ needs "
                "one that is: use more or other calibration text, or round to nearest (--no-gptq)"
            )
        log.warning("Cholesky failed for %s with damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    del H
    eye = torch.eye(len(diagonal), device=L.device, dtype=L.dtype)
    U: Tensor = torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
    diagonal = U.diagonal().clone()
    return U.div_(diagonal.unsqueeze(1)), diagonal.square().reciprocal()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products in full float32, whatever the caller allows: error feedback adds up over thousands of columns."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _stack(weights: Sequence[Tensor], linear: LinearScheme, name: str) -> Tensor:
    """The weights' columns as rows [K, sum N_i] float32, the normal ones rotated."""
    W = torch.empty(weights[0].shape[1], sum(w.shape[0] for w in weights), device=weights[0].device)
    normal, _ = linear.split(W.shape[0])
    for weight, rows in zip(weights, _row_slices([w.shape[0] for w in weights]), strict=True):
        columns = weight[:, :normal]
        W[:normal, rows] = (columns if linear.rotation is None else rotate(columns, linear.rotation)).T
        W[normal:, rows] = weight[:, normal:].T
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"{name} holds NaN or infinity; quantization needs finite values. Check the source of {name}")
    return W


def _whole_scales(W: Tensor, sizes: list[int], spec: TensorSpec) -> list[Scale]:
    """For each weight in W [Kn, N], what is chosen once over all of it: outer scales, or a per-tensor scale."""
    if spec.outer is None and not isinstance(spec.granularity, PerTensor):
        return []
    if spec.clip == "mse" and spec.outer is not None:
        spec = replace(spec, clip=1.0)  # the search is over inner scales
    return [choose_scale(part.T, spec) for part in W.split(sizes, dim=1)]


def _row_slices(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _spread(scales: Sequence[Scale], sizes: Sequence[int]) -> Scale:
    """Scales that cover whole weights, one for each stacked row: [N, 1] each. Group scales are not looked at."""

    def rows(parts: list[Tensor | None]) -> Tensor | None:
        known = [p[:, :1].expand(n, 1) for p, n in zip(parts, sizes, strict=True) if p is not None]
        return torch.cat(known).contiguous() if known else None

    scale = rows([s.scale for s in scales])
    assert scale is not None
    return Scale(scale, rows([s.zero_point for s in scales]), rows([s.outer for s in scales]))


def _join(scales: Sequence[Scale]) -> Scale:
    """Scales of adjacent groups, each [N, 1], side by side; the outer one is the same for all."""
    if not scales:
        return Scale(torch.empty(0))
    zeros = [s.zero_point for s in scales if s.zero_point is not None]
    return Scale(torch.cat([s.scale for s in scales], 1), torch.cat(zeros, 1) if zeros else None, scales[0].outer)


def _rows_of(scale: Scale, rows: slice) -> Scale:
    zero = scale.zero_point
    return Scale(scale.scale[rows].contiguous(), None if zero is None else zero[rows].contiguous())
