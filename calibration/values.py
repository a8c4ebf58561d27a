"""What calibration finds for values that a low-bit cache rounds: a matrix for each head, folded into the weights.

v times a matrix T, and o times its inverse, leave the model what it is, so T is free. Each row v T is rounded in steps
of its own size, and what attention gives has the error of a row times the attention it is paid. With a_qt the share of
query q's attention that token t gets, the error of o's output goes with

    tr(T^T V T) tr(T^-1 M T^-T),   V = E[sum_q a_qt^2 v_t v_t^T],   M = W_o^T W_o of the heads that read it.

It is least at T = G^(1/2) with G V G = M: then both are T^T V T, up to a factor. The weights a^2 are what matters: a
sequence's first token has a small value and most of the attention, and a T that does not know it makes predictions
worse. V and M get DAMPING of their mean energy in every direction: from 0.1 to 1 the error is the same within 2 %.

Then a mirror: the reflection that takes the first eigenvector of T^T V T to the direction of equal channels puts it
into the zero point where that keeps the mean of a row (atom/quant/mean_zero.py), where it costs no range and has no
error. By the symmetry above it is also o's.

Where o's input is rounded in blocks behind a Hadamard matrix of its own, equal channels would be one loud channel:
there values stay as they are.
"""

import torch
from torch import Tensor, nn

from atom.kernels.dense_attention import AttentionSpec
from atom.models.attention import Attention
from atom.models.rope import Rotation

from .keys import mirror_of, second_moments

DAMPING = 0.5


class ValueStatistics:
    """Second moments of the values of a layer, weighted by the attention they are paid."""

    def __init__(self, num_kv_heads: int) -> None:
        self.num_kv_heads = num_kv_heads
        self._moments: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self._moments is None

    def add(self, v: Tensor, paid: Tensor) -> None:
        """v [T, num_kv_heads * head_dim], paid [T, num_kv_heads], see `attention_paid`."""
        heads = v.unflatten(-1, (self.num_kv_heads, -1)).float() * paid.sqrt().unsqueeze(-1)
        found = second_moments(heads, self.num_kv_heads)
        self._moments = found if self._moments is None else self._moments + found

    def matrix(self, o: Tensor) -> Tensor:
        """T [num_kv_heads, head_dim, head_dim] for the weight `o` [hidden_size, num_heads * head_dim], float32."""
        assert self._moments is not None
        heads, dim = self._moments.shape[:2]
        columns = o.double().unflatten(1, (heads, -1, dim))
        values, reading = _damped(self._moments), _damped(torch.einsum("nhgi,nhgj->hij", columns, columns))
        root = _power(reading, 0.5)
        balanced = root @ _power(root @ values @ root, -0.5) @ root  # G
        matrix = _power(balanced, 0.5)
        mirror = mirror_of(matrix @ values @ matrix, is_rotated=False).double()
        reflected = matrix - (matrix @ mirror.unsqueeze(2)) * mirror.unsqueeze(1)
        return reflected.float()


def attention_paid(q: Tensor, k: Tensor, rotation: Rotation, rules: AttentionSpec) -> Tensor:
    """The sum over queries, and over the heads that share a KV head, of the squared attention that each token gets.

    q [T, num_heads, head_dim], k [T, num_kv_heads, head_dim] before RoPE, of whole windows that begin at position 0
    rotation  of one window's positions
    returns   float32 [T, num_kv_heads]
    """
    length = rotation.cos.shape[0]
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = distance < 0 if rules.window is None else (distance < 0) | (distance >= rules.window)
    repeats = q.shape[1] // k.shape[1]
    paid = []
    for queries, keys in zip(q.split(length), k.split(length), strict=True):
        turned, seen = rotation.apply(queries.float()), rotation.apply(keys.float())
        found = torch.zeros(length, k.shape[1], device=q.device)
        for head in range(q.shape[1]):  # one at a time: scores of all would crowd a GPU
            scores = turned[:, head] @ seen[:, head // repeats].T * rules.scale
            shares = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            found[:, head // repeats] += shares.square_().sum(0)
        paid.append(found)
    return torch.cat(paid)


def transform_values_(attention: Attention, matrix: Tensor, sample: Tensor) -> Tensor:
    """Multiply what v gives by `matrix` and what o takes by its inverse, in the weights.

    Returns `sample` [T, N] of v's outputs so multiplied.
    """
    v, o = attention.v_proj, attention.o_proj
    assert isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    v.weight = nn.Parameter(_times(v.weight.T, matrix).T.contiguous(), requires_grad=False)
    if v.bias is not None:
        v.bias = nn.Parameter(_times(v.bias[None], matrix)[0], requires_grad=False)
    repeats = o.in_features // (matrix.shape[0] * matrix.shape[1])
    inverse = torch.linalg.inv(matrix.double()).mT.float()
    o.weight = nn.Parameter(_times(o.weight, inverse.repeat_interleave(repeats, 0)), requires_grad=False)
    return _times(sample, matrix)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., heads * head_dim], each head times its matrix."""
    found: Tensor = torch.einsum("...hi,hij->...hj", x.unflatten(-1, matrix.shape[:2]), matrix).flatten(-2)
    return found


def _damped(moments: Tensor) -> Tensor:
    """`moments` of mean energy 1 a channel, and DAMPING in every direction."""
    energy = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    return moments / energy + DAMPING * torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)


def _power(moments: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh(moments)
    found: Tensor = (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT
    return found
