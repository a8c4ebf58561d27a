"""What kernels compiled here are run with in the emulator: their PTX, and tensors as arrays of their bits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def bf16(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def ptx(compile: Any, config: Any, folder: Path) -> str:
    text: str = compile(config, f"--keep-ptx --dump-dir {folder}").__ptx__
    return text
