"""What a process may still take of memory, so that a model too large for it is refused before it is read.

Without this a GPU's memory ends after minutes of reading; and when the host's does, the system kills the process, which
can then say nothing.
"""

from pathlib import Path

import torch

from ..errors import UnsupportedError
from ..kernels.registry import Kernels
from ..quant.presets import get_scheme
from .footprint import measure_footprint
from .model import Model


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that are free or would be freed, as Linux and the container's limit (cgroup v2) say.

    None where neither says anything.
    """
    limits = [left for left in (_system_bytes(root / "proc/meminfo"), _cgroup_bytes(root / "sys/fs/cgroup")) if left]
    return min(limits, default=None)


def check_memory(model: Model, name: str, device: torch.device, dtype: torch.dtype, kernels: Kernels = "auto") -> None:
    """Raise UnsupportedError if the weights of `model` (on the meta device, with its scheme) do not fit on `device`.

    name     of the model, for the message
    dtype    of everything that is not quantized
    kernels  as for load_model; the reference multiplies with weights in float32, as a CPU does
    """
    scheme = model.scheme or get_scheme("bf16")
    size = measure_footprint(model, scheme, dtype, dtype)
    is_gpu = device.type == "cuda"
    needed = size.packed if is_gpu and kernels == "auto" else size.dense
    free = _gpu_bytes(device) if is_gpu else free_host_bytes()
    if free is not None and needed > free:
        hints = ["use a larger GPU" if is_gpu else "use a GPU"]
        if dtype == torch.float32 and not scheme.is_quantized:
            hints.append("--dtype bfloat16")
        hints.append("a smaller model" if scheme.is_quantized else "a model of fewer bits")
        raise UnsupportedError(
            f"the weights of {name} take {needed / 2**30:.1f} GiB on {'a GPU' if is_gpu else 'a CPU'} and "
            f"{free / 2**30:.1f} GiB of memory are free; {', '.join(hints[:-1])} or {hints[-1]}"
        )


def _gpu_bytes(device: torch.device) -> int:
    """What is free on a GPU, and what torch keeps of it without need."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


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
