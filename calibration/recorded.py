"""A step of training as a CUDA graph: tens of thousands of small kernels, whose launches take several times as long as
they run, are recorded once, after a few plain steps that load every kernel, and replayed."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_STEPS = 3  # before a step is recorded


class RecordedStep:
    """Runs `step` on batches of one shape; recorded on a GPU.

    step     takes a batch, learns from it, returns the loss, a tensor without dimensions; to be recorded it copies
             nothing from the host and asks for no value
    clear    drops the gradients of the step before
    records  whether it can be
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        clear: Callable[[], None],
        device: torch.device,
        records: bool = True,
    ) -> None:
        self._step = step
        self._clear = clear
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and records else None
        self._done = 0

    def __call__(self, batch: Tensor) -> Tensor:
        self._done += 1
        if self._stream is None:
            return self._plain(batch)
        if self._done <= PLAIN_STEPS:  # on a stream of its own, as recording wants it
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                loss = self._plain(batch)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return loss
        if self._graph is None:
            try:
                self._record(batch)
            except RuntimeError as error:
                log.warning("the training step cannot be recorded and is launched kernel by kernel: %s", error)
                self._stream = self._graph = None
                return self._plain(batch)
        assert self._graph is not None
        self._batch.copy_(batch)
        self._graph.replay()
        return self._loss.clone()

    def _plain(self, batch: Tensor) -> Tensor:
        self._clear()
        return self._step(batch.to(self._device))

    def _record(self, batch: Tensor) -> None:
        self._clear()
        self._batch = batch.to(self._device, copy=True)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph has memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._step(self._batch)
