"""Statistics of a linear's input: channel energies and the Hessian of the layer-wise error.

Both are sums over tokens, taken batch by batch. A NaN or an infinity in them would spread silently through the
Cholesky factor into every weight, so the results are checked and a bad one names the layer and the channel.
"""

import torch
from torch import Tensor

from atom.errors import CalibrationError

SPLIT_COLUMNS = 2048  # a Hessian wider than this is summed in tiles of its upper triangle: 5/8 of the work at 4 tiles


class EnergyAccumulator:
    """Channel energy s_j = mean over tokens of x_j^2: the diagonal of the Hessian, up to its factor 2."""

    def __init__(self, channels: int, device: torch.device, name: str) -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._tokens = 0
        self._name = name

    def add(self, x: Tensor) -> None:
        """Add the tokens x [T, K] float32."""
        self._sum += torch.linalg.vector_norm(x, dim=0).double().square()
        self._tokens += x.shape[0]

    def mean(self) -> Tensor:
        """The energies [K] float32; CalibrationError if one is not finite."""
        energy = (self._sum / max(self._tokens, 1)).float()
        check_finite(energy, self._name)
        return energy


class HessianAccumulator:
    """H = 2/n sum of x x^T over n tokens, float32. Source: GPTQ, arXiv:2210.17323, equation 1."""

    def __init__(self, channels: int, device: torch.device, name: str) -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self._tokens = 0
        self._name = name

    def add(self, x: Tensor) -> None:
        """Add the tokens x [T, K] float32."""
        K = x.shape[1]
        step = K if K <= SPLIT_COLUMNS else -(-K // 4)
        for start in range(0, K, step):
            stop = min(start + step, K)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self._tokens += x.shape[0]

    def finish(self) -> Tensor:
        """The Hessian [K, K]; CalibrationError if its diagonal is not finite. The accumulator is spent."""
        H = self._sum
        del self._sum
        step = H.shape[0] if H.shape[0] <= SPLIT_COLUMNS else -(-H.shape[0] // 4)
        for start in range(step, H.shape[0], step):
            H[start : start + step, :start] = H[:start, start : start + step].T
        H.mul_(2.0 / max(self._tokens, 1))
        check_finite(H.diagonal(), self._name)
        return H


def check_finite(x: Tensor, name: str) -> None:
    """Raise CalibrationError naming the first channel of x [K] that is NaN or infinite."""
    bad = ~torch.isfinite(x)
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise CalibrationError(
            f"the statistics of {name} are not finite ({int(bad.sum())} of {x.numel()} channels, the first {channel}); "
            "calibration needs finite activations: check that the model gives finite logits on this text"
        )
