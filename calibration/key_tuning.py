"""Factors of keys and their mirror's direction, found together.

Zero points that keep the mean store what keys have along the mirror's direction n: there a row has neither error nor
range. So behind factors f (keys divided, queries multiplied) a head's scores have an error like

    (tr K - n^T K n) (tr Q - n^T Q n),   K = F^-1 E[k k^T] F^-1,  Q = F E[q q^T] F

for the second moments of keys less their centre and of queries, after RoPE: what is left of keys' energy sets the size
of a step, what is left of queries' is what its error meets. Factors alone are least at equal energies (keys.py), a
direction alone at the main one of queries; from there the logarithm of the product goes down by Adam, over the factors
of the pairs that RoPE turns and n. Its minimum is flat: three
times the steps change the error by a thousandth.
"""

import torch
from torch import Tensor

STEPS, RATE = 100, 0.05


def tune_keys(keys: Tensor, queries: Tensor, factors: Tensor, is_shared: bool) -> tuple[Tensor, Tensor]:
    """Factors float32 [heads, head_dim / 2], their geometric mean 1, and directions n [heads, head_dim], |n| = 1.

    keys, queries  second moments [heads, head_dim, head_dim] of keys less their centre, and of queries
    factors        [heads, head_dim / 2] to begin with
    is_shared      factors are the same for all heads
    """
    with torch.enable_grad():
        keys, queries = (_unit(x.detach()) for x in (keys, queries))
        logs = factors.log()[:1] if is_shared else factors.log()
        logs = logs.detach().clone().requires_grad_()
        n = torch.linalg.eigh(_scaled(queries, _both(logs).detach()))[1][..., -1].clone().requires_grad_()
        optimizer = torch.optim.Adam([logs, n], RATE)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            score_error(keys, queries, _both(logs), n).log().sum().backward()
            optimizer.step()
    logs = logs.detach() - logs.detach().mean(-1, keepdim=True)
    return logs.exp().expand(keys.shape[0], -1).contiguous(), n.detach() / n.detach().norm(dim=-1, keepdim=True)


def score_error(keys: Tensor, queries: Tensor, factors: Tensor, direction: Tensor) -> Tensor:
    """The product above for each head [heads]; factors [heads or 1, head_dim], direction [heads, head_dim]."""
    n = direction / direction.norm(dim=-1, keepdim=True)
    return _left(_scaled(keys, 1 / factors), n) * _left(_scaled(queries, factors), n)


def _left(moments: Tensor, n: Tensor) -> Tensor:
    """The energy that is not along n."""
    energy: Tensor = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
    return energy - torch.einsum("hi,hij,hj->h", n, moments, n)


def _both(logs: Tensor) -> Tensor:
    """Factors of channels [heads, head_dim] of the logarithms of those of pairs."""
    return torch.cat((logs, logs), -1).exp()


def _scaled(moments: Tensor, factors: Tensor) -> Tensor:
    return moments * factors[:, :, None] * factors[:, None, :]


def _unit(moments: Tensor) -> Tensor:
    """`moments` of mean energy 1 a channel, and no direction without a millionth of that, whatever rounding left."""
    energies, directions = torch.linalg.eigh(moments.double())
    mean = energies.clamp_min(0).mean(-1, keepdim=True)
    energies = torch.where(mean > 0, energies / mean.clamp_min(1e-30), 1.0).clamp_min(1e-6)
    found: Tensor = (directions * energies.unsqueeze(-2)) @ directions.mT
    return found.float()
