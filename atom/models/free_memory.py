"""What a process may still take of the host's memory, so that a model too large for it is refused before it is read.

Without this the kernel of the system kills the process some minutes later, which can then say nothing.
"""

from pathlib import Path

import torch

from ..errors import UnsupportedError
from ..quant.presets import get_scheme
from .footprint import measure_footprint
from .model import Model


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that are free or would be freed, as Linux and the container's limit (cgroup v2) say.

    None where neither says anything.
    """
    limits = [left for left in (_system_bytes(root / "proc/meminfo"), _cgroup_bytes(root / "sys/fs/cgroup")) if left]
    return min(limits, default=None)


def check_host_memory(model: Model, name: str, dtype: torch.dtype) -> None:
    """Raise UnsupportedError if the weights of `model` (on the meta device, with its scheme) do not fit on the host.

    name   of the model, for the message
    dtype  of everything that is not quantized
    """
    scheme = model.scheme or get_scheme("bf16")
    needed, free = measure_footprint(model, scheme, dtype, dtype).dense, free_host_bytes()
    if free is not None and needed > free:
        smaller = ", --dtype bfloat16" if dtype == torch.float32 and not scheme.is_quantized else ""
        raise UnsupportedError(
            f"the weights of {name} take {needed / 2**30:.1f} GiB on a CPU and {free / 2**30:.1f} GiB of memory are "
            f"free; use a GPU{smaller} or a smaller model"
        )


def _system_bytes(meminfo: Path) -> int | None:
    if not meminfo.is_file():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
    available = kilobytes.get("MemAvailable")
    return None if available is None else (available + kilobytes.get("SwapFree", 0)) * 1024


def _cgroup_bytes(folder: Path) -> int | None:
    most, used = folder / "memory.max", folder / "memory.current"
    if not (most.is_file() and used.is_file()) or not (limit := most.read_text().strip()).isdigit():
        return None
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    reclaimable = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))  # files that were read
    return max(1, int(limit) - int(used.read_text()) + reclaimable)
