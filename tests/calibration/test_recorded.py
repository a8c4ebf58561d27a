"""A recorded step of training learns what the plain one learns, batch by batch."""

import logging

import pytest
import torch
from torch import Tensor

from atom.calibration.recorded import PLAIN_STEPS, RecordedStep

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def learn(device: str, records: bool, steps: int = PLAIN_STEPS + 5) -> tuple[Tensor, list[float]]:
    """What `steps` batches make of a weight, and the losses on the way."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=draw).to(device).requires_grad_()
    rate = torch.tensor(0.05, device=device)
    optimizer = torch.optim.Adam([weight], lr=rate if device == "cuda" else 0.05, capturable=device == "cuda")

    def step(batch: Tensor) -> Tensor:
        loss = (batch @ weight.T - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = RecordedStep(step, lambda: optimizer.zero_grad(set_to_none=True), torch.device(device), records)
    losses = [float(run(torch.randn(16, 6, generator=draw))) for _ in range(steps)]
    return weight.detach().cpu(), losses


def test_gradients_of_the_step_before_are_dropped() -> None:
    weight, losses = learn("cpu", records=True)
    again, same = learn("cpu", records=False)
    assert torch.equal(weight, again) and losses == same and losses[-1] < losses[0]


@pytest.mark.gpu
@on_gpu
def test_a_recording_learns_as_plain_steps_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        weight, losses = learn("cuda", records=True)
    assert not caplog.records
    plain, expected = learn("cuda", records=False)
    torch.testing.assert_close(weight, plain, atol=1e-5, rtol=1e-4)
    assert losses == pytest.approx(expected, rel=1e-4)
