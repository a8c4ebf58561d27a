"""Device names: what is meant, and what a user reads where it is not there."""

import re
from pathlib import Path

import pytest
import torch

from atom.errors import UnsupportedError
from atom.models.device import choose_device
from atom.models.loader import load_model


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "device"), [(0, "auto", "cpu"), (1, "auto", "cuda"), (2, "cuda:1", "cuda:1")]
)
def test_names(count: int, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, count)
    assert choose_device(name) == torch.device(device)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "error", "message"),
    [
        (0, "cudaa", ValueError, "unknown device 'cudaa'; use cpu, cuda"),
        (0, "cuda", UnsupportedError, "cuda was asked for and torch sees no GPU; use --device cpu"),
        (1, "cuda:1", UnsupportedError, "cuda:1 was asked for and torch sees 1 GPU; use --device cpu"),
    ],
)
def test_what_is_not_there(
    count: int, name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpus(monkeypatch, count)
    with pytest.raises(error, match=re.escape(message)):
        choose_device(name)
    with pytest.raises(error, match=re.escape(message)):
        load_model(tmp_path, device=name)
