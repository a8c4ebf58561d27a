"""A host's free memory as the system tells it, and models that are too large for it."""

from pathlib import Path

import pytest
import torch

from atom.errors import UnsupportedError
from atom.kernels.registry import Kernels
from atom.models import free_memory
from atom.models.footprint import measure_footprint
from atom.models.free_memory import check_memory, free_host_bytes
from atom.models.loader import load_model, meta_model
from atom.models.source import Source
from atom.quant.presets import get_scheme

from .random_models import LLAMA, random_model, save_model

MEMINFO = (
    "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\nSwapFree:  300 kB\nHugePages_Total: 0\n"
)


def system(root: Path, **cgroup: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(MEMINFO)
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    for name, text in cgroup.items():
        (folder / f"memory.{name}").write_text(text)
    return root


def test_what_is_free_is_what_linux_would_hand_out(tmp_path: Path) -> None:
    assert free_host_bytes(system(tmp_path)) == 1000 * 1024


@pytest.mark.parametrize(
    "limit,free", [("max\n", 1000 * 1024), (f"{900 * 1024}\n", 300 * 1024), ("5000000\n", 1000 * 1024)]
)
def test_a_container_may_have_less(limit: str, free: int, tmp_path: Path) -> None:
    """The files that it has read count as free: they go where memory is wanted."""
    stat = f"anon 5\nactive_file {50 * 1024}\ninactive_file {150 * 1024}\n"
    assert free_host_bytes(system(tmp_path, max=limit, current=f"{800 * 1024}\n", stat=stat)) == free


def test_a_container_at_its_limit_has_next_to_nothing(tmp_path: Path) -> None:
    assert free_host_bytes(system(tmp_path, max="1000\n", current="1000\n", stat="inactive_file 0\n")) == 1


def test_other_systems_say_nothing(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None


@pytest.mark.parametrize(
    "dtype,hint",
    [
        (torch.float32, "use a GPU, --dtype bfloat16 or a model of fewer bits"),
        (torch.bfloat16, "use a GPU or a model of fewer bits"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    dtype: torch.dtype, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(LLAMA)
    path = save_model(model, tmp_path / "large")
    needed = sum(p.numel() for p in model.state_dict().values()) * dtype.itemsize
    monkeypatch.setattr(free_memory, "free_host_bytes", lambda: needed)
    assert load_model(path, dtype=dtype).dtype == dtype
    monkeypatch.setattr(free_memory, "free_host_bytes", lambda: needed - 1)
    monkeypatch.setattr(Source, "get", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(UnsupportedError, match=f"weights of large take 0.0 GiB on a CPU and .* are free; {hint}$"):
        load_model(path, dtype=dtype)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("scheme", ["bf16", "w4a8"])
def test_a_gpu_holds_packed_weights_or_those_of_the_reference(
    scheme: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps without need counts as free."""
    model, kept = meta_model(random_model(LLAMA).config), 1000
    model.scheme = get_scheme(scheme)
    size = measure_footprint(model, model.scheme, torch.bfloat16, torch.bfloat16)
    needed = size.packed if kernels == "auto" else size.dense
    assert (size.packed < size.dense) == (scheme == "w4a8")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * kept)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * kept)
    arguments = model, "large", torch.device("cuda"), torch.bfloat16, kernels
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - kept, 0))
    check_memory(*arguments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - kept - 1, 0))
    hint = "a smaller model" if scheme == "w4a8" else "a model of fewer bits"
    with pytest.raises(UnsupportedError, match=f"on a GPU and .* use a larger GPU or {hint}$"):
        check_memory(*arguments)
