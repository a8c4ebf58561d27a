"""What holds for all tests: those marked `gpu` skip, with the reason, where there is no fitting GPU."""

import pytest
import torch


def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 9.0, and there is none"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"needs compute capability 9.0, this GPU has {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
