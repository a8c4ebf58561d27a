"""A short soak of the whole server on a tiny model; `python -m benchmarks.soak` runs the long ones.

ATOM_SOAK_SECONDS makes it longer.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.soak import soak

SECONDS = float(os.environ.get("ATOM_SOAK_SECONDS", "10"))


@pytest.mark.slow
def test_soak(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    report = soak(str(model), SECONDS, cache_tokens=512, distinct=12, fault_rate=0.005)
    print(report)
    assert report.faults and report.tokens > 500
    report.check(max_growth_mib=32)
