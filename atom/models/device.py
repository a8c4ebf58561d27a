"""Which device the name in an option means, checked before anything is put there."""

import torch

from ..errors import UnsupportedError


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
