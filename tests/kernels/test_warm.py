"""A model as it is set up for a GPU, without one: what it launches, what that computes, what is compiled for it."""

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn

from atom.kernels import cache
from atom.kernels.warm import Kernel, model_kernels, step_kernels, warm_up
from atom.models import quantized, twins
from atom.models.kv import DenseKV
from atom.models.loader import load_model
from atom.models.model import Model
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import Scheme

from ..models.random_models import CONFIGS, quantized_state, random_model, save_state
from .emulated import EmulatedGpu
from .machine_code import needs_dsl

SIZES = {"intermediate_size": 136, "hidden_size": 80, "head_dim": 24}  # multiples of 8, of nothing else


def saved(family: str, name: str, path: Path) -> tuple[Path, Scheme]:
    scheme = get_scheme(name + "+kv16")
    if scheme.outliers.count:
        scheme = replace(scheme, outliers=replace(scheme.outliers, count=16))
    model = random_model({**CONFIGS[family], **SIZES})
    state, _, _ = quantized_state(model, scheme)
    model.scheme = scheme
    return save_state(state, model, path), scheme


def reference(path: Path) -> Model:
    """The model on the CPU, the outputs of its linears rounded as the GEMM rounds them."""
    model = load_model(path)
    for module in model.modules():
        if isinstance(module, twins.QuantizedLinear):
            module.register_forward_hook(lambda module, args, y: y.bfloat16().float())
    return model


def on_sm90(path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model as it is made for a GPU of compute capability 9.0, its tensors on the CPU."""
    for module in (twins, quantized):
        monkeypatch.setattr(module, "device_arch", lambda device: "sm_90")
    return load_model(path)


def run(model: Model, scheme: Scheme) -> torch.Tensor:
    tokens = torch.arange(26) % 61
    kv = DenseKV(model.config, 2, scheme.kv, scheme.kv_pre_rope)
    with torch.inference_mode():
        return model.logits(model(tokens, kv.positions(13), kv))


LAYER = ["gemm", "plain", "gemm", "add_norm", "gemm", "silu", "gemm"]  # behind the first norm; attention is not counted


@needs_dsl
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bf16"])
def test_the_kernel_path_computes_the_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, fusion, padding, scales and their order, all of the host's side; and the launches of the design.

    Sums in another order move a code that stands near a tie, or a factor and with it a group's codes; anything else
    that is wrong moves all of them.
    """
    path, scheme = saved("llama", name, tmp_path / "model")
    wanted = run(reference(path), scheme)
    gpu = EmulatedGpu(monkeypatch)
    found = run(on_sm90(path, monkeypatch), scheme)
    assert gpu.launches == ["norm", *LAYER, "add_norm", *LAYER]
    assert float((found - wanted).norm() / wanted.norm()) < 0.06


@needs_dsl
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_other_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of q, k and v in one GEMM; norms of heads on slices of its output; Gemma's norms and GeGLU."""
    path, scheme = saved(family, "w4a8", tmp_path / "model")
    wanted = run(reference(path), scheme)
    gpu = EmulatedGpu(monkeypatch)
    found = run(on_sm90(path, monkeypatch), scheme)
    assert gpu.launches.count("gemm") == 8 and gpu.launches.count("add_norm") == 3
    assert float((found - wanted).norm() / wanted.norm()) < 0.06


@needs_dsl
def test_kernels_of_a_step_are_where_they_are_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that a process of its own can be given, and the very files that they write."""
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path))
    asked: list[Path] = []
    monkeypatch.setattr(cache, "_library", lambda name, key, compile, arch: asked.append(cache.kernel_path(name, key)))
    monkeypatch.setattr(cache, "_open", lambda path: None)
    monkeypatch.setattr(cache, "_loaded", {})
    for kernel in step_kernels():
        job = pickle.loads(pickle.dumps(kernel.compile))
        job.__wrapped__()
    assert asked == [kernel.path for kernel in step_kernels()] and len(set(asked)) == 4


def test_a_first_start_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar on stderr that counts every kernel that is missing, and none where all are there."""
    shown: list[Any] = []

    class Bar(Progress):
        def add_task(self, description: str, *args: Any, **more: Any) -> Any:
            shown.append((description, more["total"], self.console.stderr))
            return super().add_task(description, *args, **more)

        def update(self, task_id: Any, *args: Any, **more: Any) -> None:
            shown.append(more["completed"])
            super().update(task_id, *args, **more)

    monkeypatch.setattr("rich.progress.Progress", Bar)
    paths = [tmp_path / name for name in "abc"]
    kernels = [Kernel(path, partial(path.write_text, "compiled")) for path in paths]
    paths[1].write_text("there already")
    assert warm_up(nn.Module(), torch.bfloat16, workers=2, others=kernels) == 2
    assert shown == [("compiling GPU kernels", 2, True), 1, 2] and all(path.exists() for path in paths)
    assert warm_up(nn.Module(), torch.bfloat16, others=kernels) == 0 and len(shown) == 3


@pytest.mark.slow
@needs_dsl
def test_a_warm_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a forward pass asks for was compiled beforehand; the second time nothing is compiled."""
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    path, scheme = saved("llama", "w8a8", tmp_path / "model")
    model = on_sm90(path, monkeypatch)
    expected = {kernel.path for kernel in model_kernels(model, torch.float32, (16,))}
    assert warm_up(model, torch.float32, (16,), workers=1) == len(expected)
    assert {p for p in (tmp_path / "cache" / "kernels").iterdir() if p.suffix == ".so"} == expected
    assert warm_up(model, torch.float32, (16,)) == 0
    asked: list[Path] = []
    monkeypatch.setattr("atom.kernels.cache._open", lambda library: asked.append(library) or (lambda *args: None))
    monkeypatch.setattr("atom.kernels.cache._loaded", {})
    tokens = torch.arange(13) % 61
    kv = DenseKV(model.config, 1, scheme.kv, scheme.kv_pre_rope)
    with torch.inference_mode():
        model(tokens, kv.positions(13), kv)
    assert asked and set(asked) <= expected
