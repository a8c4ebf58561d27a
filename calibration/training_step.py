"""One step of distillation: gradients of a batch, and what the optimizer makes of them.

A step is tens of thousands of small kernels, whose launches take several times as long as they run. On a GPU it is
therefore recorded as a CUDA graph, after a few plain steps that load every kernel, and replayed.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .student import Learning

log = logging.getLogger(__name__)

PLAIN_STEPS = 3  # before a step is recorded
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
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(self._device) if on_gpu and records else None
        self._done = 0

    def __call__(self, batch: Tensor, factor: float) -> Tensor:
        """Learn from `batch`, always of the same shape, at `factor` times the learning rates; its loss."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        self._done += 1
        if self._stream is None:
            return self._step(batch)
        if self._done <= PLAIN_STEPS:  # on a stream of its own, as recording wants it
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                loss = self._step(batch.to(self._device))
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return loss
        if self._graph is None:
            try:
                self._record(batch)
            except RuntimeError as error:
                log.warning("the training step cannot be recorded and is launched kernel by kernel: %s", error)
                self._stream = self._graph = None
                return self._step(batch.to(self._device))
        assert self._graph is not None
        self._batch.copy_(batch)
        self._graph.replay()
        return self._loss.clone()

    def _step(self, batch: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(batch)
        self._optimizer.step()
        return loss

    def _record(self, batch: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._batch = batch.to(self._device, copy=True)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph has memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._step(self._batch)


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Share of the learning rate at `step` of `steps`: a rise over the first `warm_up`, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
