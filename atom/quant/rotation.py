"""Hadamard rotations: orthogonal transforms that spread outliers over channels.

Orders are 1, 2, those of Paley's two constructions over prime fields (12, 20, 28, 36, 44, 76, 140 among them), and
any of these times a power of two (Sylvester). Matrices are scaled by 1/sqrt(n), so that H @ H.T is the identity.
A large matrix is a Kronecker product and is applied factor by factor: order 14336 would be 0.8 GB as a whole.
"""

from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from .schemes import RotationSpec


def hadamard(n: int) -> Tensor:
    """Orthogonal Hadamard matrix float32 [n, n]; ValueError where no construction at hand reaches n."""
    H = torch.ones(1, 1)
    for factor in _factors(n):
        H = torch.kron(H, factor)
    return H


def rotate(x: Tensor, spec: RotationSpec) -> Tensor:
    """x [..., K] times the spec's rotation, float32. `unrotate` undoes it."""
    return _apply(x, spec, transpose=False)


def unrotate(x: Tensor, spec: RotationSpec) -> Tensor:
    """x [..., K] times the inverse (the transpose) of the spec's rotation, float32."""
    return _apply(x, spec, transpose=True)


def _apply(x: Tensor, spec: RotationSpec, transpose: bool) -> Tensor:
    columns = x.shape[-1]
    block = columns if spec.kind == "hadamard" else spec.block
    whole = columns - columns % block
    if whole == 0:
        return x.float()
    blocks = x[..., :whole].float().unflatten(-1, (-1, block))
    for H in reversed(_factors_on(block, x.device)):  # each product turns its axis to the front: in the end all fit
        blocks = (blocks.unflatten(-1, (-1, H.shape[0])) @ (H.T if transpose else H)).transpose(-1, -2).flatten(-2)
    rotated = blocks.flatten(-2)
    return rotated if whole == columns else torch.cat((rotated, x[..., whole:].float()), -1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may serve where gradients are wanted
def _factors_on(n: int, device: torch.device) -> tuple[Tensor, ...]:
    """`_factors(n)` on a device: copied once, since every copy makes the host wait for all that runs there."""
    return tuple(factor.to(device) for factor in _factors(n))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _factors(n: int) -> tuple[Tensor, ...]:
    """Orthogonal matrices whose Kronecker product is the Hadamard matrix of order n.

    Sylvester's of order 512 at most, then Paley's of the smallest order that divides n.
    """
    odd = n // (n & -n)
    base = odd
    paley = torch.ones(1, 1) if odd == 1 else None
    while paley is None and base < n:
        base *= 2
        paley = _paley(base)
    if paley is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here; use block_hadamard with a power of two")
    factors = [] if base == 1 else [paley / sqrt(base)]
    power = n // base
    while power > 1:
        size = min(power, 512)
        factors.insert(0, _sylvester(size) / sqrt(size))
        power //= size
    return tuple(factors)


def _sylvester(n: int) -> Tensor:
    """Hadamard matrix of +-1 of a power of two."""
    H = torch.ones(1, 1)
    while H.shape[0] < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)), 0)
    return H


def _paley(n: int) -> Tensor | None:
    """Paley's construction I (n = q + 1, q = 3 mod 4) or II (n = 2 (q + 1), q = 1 mod 4) for a prime q."""
    q = n - 1
    if q % 4 == 3 and _is_prime(q):
        return torch.eye(n) + _conference(q, skew=True)
    q = n // 2 - 1
    if n % 2 == 0 and q % 4 == 1 and _is_prime(q):
        C, eye = _conference(q, skew=False), torch.eye(q + 1)
        return torch.cat((torch.cat((C + eye, C - eye), 1), torch.cat((C - eye, -C - eye), 1)), 0)
    return None


def _conference(q: int, skew: bool) -> Tensor:
    """The bordered matrix of quadratic residues mod q, [q + 1, q + 1]: zero diagonal, C @ C.T = q I."""
    residues = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)])
    index = torch.arange(q)
    C = torch.zeros(q + 1, q + 1)
    C[0, 1:] = 1
    C[1:, 0] = -1 if skew else 1
    C[1:, 1:] = chi[(index[None, :] - index[:, None]) % q]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(sqrt(n)) + 1))
