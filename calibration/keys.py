"""What calibration finds for keys that a low-bit cache rounds: their centre, factors that queries undo, a mirror.

All act on keys after RoPE, as the cache rounds them (atom/quant/keys.py).

Centre c: softmax does not see a constant taken off all keys. c is the mean key over tokens and positions. What RoPE
turns fast has no mean; what it turns slowly keeps it, and there the loud biases lie that would set every token's range.

Sink: a sequence's first token draws most of the attention in most layers, with a key that is nearly the same in every
sequence, so that all queries of all sequences meet the same error of this one key. c moves by it, to k_0 - Q(k_0 - c):
then k_0 less the new c is a point of the grid, and other keys do not notice half a step.

Factors f of the pairs that RoPE turns: keys are divided, queries multiplied, which commutes with RoPE and is folded
into the weights. Behind the Hadamard matrix all channels of a key have the same error, in size like the whole key's
norm; scores have it times the query's norm, and sum |k_j / f_j|^2 sum |q_j f_j|^2 is least at f_j^2 = |k_j| / |q_j|.

Mirror: queries have a main direction, the first eigenvector of their second moment, with a third of their energy. The
reflection that takes it to the direction of equal channels puts it into the zero point, where rounding leaves the mean
of a row as it was (atom/quant/mean_zero.py): along it scores have no error. It costs keys no range either, so that
factors and direction are best chosen together (key_tuning.py).
"""

import torch
from torch import Tensor, nn

from atom.models.attention import Attention
from atom.models.norm import RMSNorm
from atom.models.rope import Rope
from atom.quant.keys import prepare_keys, restore_keys, rotate_head
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import Scheme

from .key_tuning import tune_keys

MOST_DOUBLINGS = 8  # a factor lies between 2^-8 and 2^8


class KeyStatistics:
    """Means over the keys and queries of a layer, of windows of `length` tokens that begin at position 0.

    num_kv_heads  where second moments are wanted, for a mirror; else 0
    """

    def __init__(self, rope: Rope, length: int, device: torch.device, num_kv_heads: int = 0) -> None:
        self._num_kv_heads = num_kv_heads
        self._rotation = rope(torch.arange(length, device=device))
        self._length = length
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = self._centre = self._keys = self._queries = nothing
        self._key_moments = self._query_moments = nothing  # after RoPE
        self._windows = self._query_windows = 0

    def add_keys(self, k: Tensor) -> None:
        """k [T, num_kv_heads, head_dim] before RoPE, of whole windows."""
        by_position = k.unflatten(0, (-1, self._length)).float().sum(0)  # RoPE is linear: windows are summed first
        self._mean = self._mean + by_position.mean(0)
        self._centre = self._centre + self._rotation.apply(by_position).mean(0)
        self._keys = self._keys + _pair_energy(k) / self._length
        if self._num_kv_heads:
            self._key_moments = self._key_moments + self._moments(k) / self._length
        self._windows += k.shape[0] // self._length

    def add_queries(self, q: Tensor) -> None:
        """q [T, num_heads, head_dim] before RoPE, of whole windows."""
        self._queries = self._queries + _pair_energy(q) / self._length
        if self._num_kv_heads:
            self._query_moments = self._query_moments + self._moments(q)
        self._query_windows += q.shape[0] // self._length

    @property
    def mean(self) -> Tensor:
        """The mean key before RoPE, float32 [num_kv_heads, head_dim]."""
        return (self._mean / self._windows).float()

    @property
    def centre(self) -> Tensor:
        """The mean key after RoPE, float32 [num_kv_heads, head_dim]."""
        return (self._centre / self._windows).float()

    def factors(self, is_shared: bool) -> Tensor:
        """What keys less their centre are divided by and queries multiplied with: float32 [num_kv_heads, head_dim / 2].

        is_shared: the same for all heads.
        """
        turned = self._rotation.cos[0].double().square()  # YaRN's factor
        keys = self._keys / self._windows * turned - _pair_energy(self.centre[None].double())
        queries = (self._queries / self._query_windows * turned).unflatten(0, (keys.shape[0], -1)).mean(1)
        if is_shared:
            keys, queries = (x.mean(0, keepdim=True).expand_as(x) for x in (keys, queries))
        keys, queries = (x.clamp_min(1e-12 * float(x.max())).clamp_min(1e-30) for x in (keys, queries))
        doublings = (keys / queries).log2() / 4
        doublings = doublings - doublings.mean(-1, keepdim=True)
        return doublings.clamp(-MOST_DOUBLINGS, MOST_DOUBLINGS).exp2().float()

    def mirror(self) -> Tensor:
        """What takes the main direction of queries to equal channels: see `mirror_of`."""
        return mirror_of(self._query_moments, is_rotated=True)

    def factors_and_mirror(self, is_shared: bool) -> tuple[Tensor, Tensor]:
        """`factors`, and the mirror behind them, chosen together."""
        centre = self.centre.double()
        keys = self._key_moments / self._windows - centre[:, :, None] * centre[:, None, :]
        factors, direction = tune_keys(keys, self._query_moments, self.factors(is_shared), is_shared)
        return factors, mirror_to_equal(direction, is_rotated=True)

    def _moments(self, x: Tensor) -> Tensor:
        """The sum over tokens of x x^T after RoPE, float64 [num_kv_heads, head_dim, head_dim]."""
        windows = x.split(self._length)
        return sum(
            (second_moments(self._rotation.apply(window.float()), self._num_kv_heads) for window in windows),
            torch.zeros((), dtype=torch.float64, device=x.device),
        )


def second_moments(x: Tensor, groups: int) -> Tensor:
    """x [T, heads, head_dim] -> the sum over tokens and the heads of each group of x x^T, float64 [groups, d, d]."""
    by_group = x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2).float()
    found: Tensor = (by_group.mT @ by_group).double()
    return found


def mirror_of(moments: Tensor, is_rotated: bool) -> Tensor:
    """The mirror of each head's main direction, by its second moments [heads, head_dim, head_dim]."""
    return mirror_to_equal(torch.linalg.eigh(moments.double())[1][..., -1].float(), is_rotated)


def mirror_to_equal(direction: Tensor, is_rotated: bool) -> Tensor:
    """float32 [heads, head_dim] with |w|^2 = 2: x - (w . x) w takes each head's direction to that of equal channels.

    direction   float32 [heads, head_dim], of length 1
    is_rotated  a Hadamard matrix turns heads before the reflection
    """
    main = rotate_head(direction) if is_rotated else direction
    equal = torch.full_like(main, main.shape[-1] ** -0.5)
    away = torch.where((main * equal).sum(-1, keepdim=True) > 0, -main, main) - equal  # its norm is at least 1
    mirror: Tensor = away * (2**0.5 / away.norm(dim=-1, keepdim=True))
    return mirror


def _pair_energy(x: Tensor) -> Tensor:
    """x [T, heads, head_dim] -> the sum over tokens of each pair's square, [heads, head_dim / 2]; RoPE leaves it."""
    first, second = x.float().square().sum(0).chunk(2, -1)
    return (first + second).double()


def has_norms(attention: Attention) -> bool:
    """Heads of queries and keys pass a norm, whose gain all heads share."""
    return isinstance(attention.k_norm, RMSNorm)


def fold_factors_(attention: Attention, factors: Tensor) -> dict[str, Tensor]:
    """Divide keys by `factors` [num_kv_heads, head_dim / 2] and multiply queries, in the weights.

    Into the gains of q_norm and k_norm where there are some (of one head: all are alike), else into rows and biases.
    Returns what the rows of q_proj and k_proj were multiplied with, by name.
    """
    both = torch.cat((factors, factors), -1)  # [num_kv_heads, head_dim]
    if isinstance(attention.k_norm, RMSNorm) and isinstance(attention.q_norm, RMSNorm):
        _scale_gain_(attention.q_norm, both[0])
        _scale_gain_(attention.k_norm, 1 / both[0])
        return {}
    heads = attention.q_proj.out_features // both.shape[1]
    rows = {"q_proj": both.repeat_interleave(heads // both.shape[0], 0).flatten(), "k_proj": (1 / both).flatten()}
    for name, scale in rows.items():
        linear = attention.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight * scale[:, None], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias * scale, requires_grad=False)
    return {f"self_attn.{name}": scale for name, scale in rows.items()}


def _scale_gain_(norm: RMSNorm, scale: Tensor) -> None:
    norm.weight = nn.Parameter(norm.gain() * scale - norm.offset, requires_grad=False)


def centre_on_sink(centre: Tensor, first: Tensor, scheme: Scheme, layer: int) -> Tensor:
    """The centre of a layer (keys.prepare_keys) moved so that the `first` key of sequences is on the grid."""
    kv = scheme.kv_of(layer)
    assert kv is not None
    rounded = fake_quantize(prepare_keys(first, centre, scheme.rotates_keys), kv)
    moved = first - restore_keys(rounded, centre, scheme.rotates_keys)
    return moved if centre.ndim == 2 else torch.stack((moved, centre[1]))
