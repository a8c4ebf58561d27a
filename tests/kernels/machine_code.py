"""What tests of machine code need: whether the compiler is there, and the instructions of a cubin."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

HAS_DSL = importlib.util.find_spec("cutlass") is not None or importlib.util.find_spec("nvidia_cutlass_dsl") is not None
needs_dsl = pytest.mark.skipif(not HAS_DSL, reason="the CuTe DSL is not installed; pip install atom-serving[kernels]")


def disassemble(cubin: bytes, folder: Path) -> str:
    """The cubin's instructions as nvdisasm writes them; skips the test where that is not installed."""
    spec = importlib.util.find_spec("nvidia")
    tools = [
        t for root in (spec.submodule_search_locations or [] if spec else []) for t in Path(root).glob("*/bin/nvdisasm")
    ]
    if not tools:
        pytest.skip("nvdisasm is not installed; pip install nvidia-cuda-nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([str(tools[0]), "-c", str(path)], capture_output=True, text=True, check=True).stdout
