"""One step of distillation: gradients of a batch, and what the optimizer makes of them; recorded on a GPU."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .recorded import RecordedStep
from .student import Learning

WEIGHTS = 0.02  # the rate of attention's weights in full precision, where they learn, and then of norms and biases
SMALLEST = 1e-3  # norms' gains and biases smaller than this in the root mean square learn as if they were so large


class TrainingStep:
    """Adam on the parameters of `learning`.

    gradients  adds the gradients of a batch to the parameters and returns the loss, a tensor without dimensions
    rate       of scales, and of norms and biases relative to their size. Where weights in full precision learn, these
               and norms and biases do at WEIGHTS times it
    records    on a GPU, whether `gradients` can be recorded: it copies nothing from the host and asks for no value
    """

    def __init__(
        self, gradients: Callable[[Tensor], Tensor], learning: Learning, rate: float, records: bool = True
    ) -> None:
        self._gradients = gradients
        self._device = learning.plain[0].device
        learned = [(learning.codes, rate), (learning.factors, rate)]
        plain = WEIGHTS if learning.weights else 1.0
        for parameters, share in ((learning.plain, plain), (learning.weights, WEIGHTS)):
            for parameter in parameters:
                size = parameter.detach().square().mean().sqrt().item()
                learned.append(([parameter], rate * share * max(size, SMALLEST)))
        learned = [(parameters, own) for parameters, own in learned if parameters]
        self._rates = [own for _, own in learned]
        on_gpu = self._device.type == "cuda"
        groups = [
            {"params": parameters, "lr": torch.tensor(own, device=self._device) if on_gpu else own}
            for parameters, own in learned
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)
        self._run = RecordedStep(self._step, lambda: self._optimizer.zero_grad(set_to_none=True), self._device, records)

    def __call__(self, batch: Tensor, factor: float) -> Tensor:
        """Learn from `batch`, always of the same shape, at `factor` times the learning rates; its loss."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        return self._run(batch)

    def _step(self, batch: Tensor) -> Tensor:
        loss = self._gradients(batch)
        self._optimizer.step()
        return loss


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Share of the learning rate at `step` of `steps`: a rise over the first `warm_up`, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
