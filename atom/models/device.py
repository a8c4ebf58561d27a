"""Which device and dtype the names in options mean, checked before anything is put there."""

import torch

from ..errors import UnsupportedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: torch.device | str) -> torch.device:
    """The device called `name` (cpu, cuda, cuda:1, ...); "auto" is the GPU where there is one, else the CPU.

    Raises ValueError for a name that torch does not know, and UnsupportedError for a GPU that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use cpu, cuda, cuda:1, ... or auto") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
            raise UnsupportedError(f"device {name} was asked for and torch sees {found}; use --device cpu or auto")
    return device


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; "auto" is float32 on a CPU and bfloat16 on a GPU. ValueError for others."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
