"""A short soak of the whole server on a tiny model; `python benchmarks/soak.py` runs the long ones.

ATOM_SOAK_SECONDS makes it longer.
"""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
SECONDS = float(os.environ.get("ATOM_SOAK_SECONDS", "10"))


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_soak(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    report = load_script().soak(str(model), SECONDS, cache_tokens=512, distinct=12, fault_rate=0.005)
    print(report)
    assert report.faults and report.tokens > 500
    report.check(max_growth_mib=32)
