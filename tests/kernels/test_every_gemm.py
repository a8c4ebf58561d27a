"""The machine code of every GEMM that a preset runs with in Llama 3 8B's shapes, at any batch size: four minutes.

With ATOM_EVERY_KERNEL=1; test_gemm_machine_code.py looks at one of each tile. (Every producer is always looked at.)
"""

import os
from pathlib import Path

import pytest

from atom.kernels.bench import SHAPES
from atom.kernels.gemm import token_bucket, token_scales
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.refusals_sm90 import weight_kind
from atom.kernels.warm import DEFAULT_TOKENS
from atom.quant.presets import PRESETS, get_scheme

from .machine_code import needs_dsl
from .test_gemm_machine_code import check_machine_code, chosen, name_of

UNIT, OUTLIER_UNIT = 128, 64  # columns


def others() -> list[GemmConfig]:
    """What the presets choose, less what test_gemm_machine_code.py compiles."""
    found: dict[GemmConfig, None] = {}
    for name in PRESETS:
        linear = get_scheme(name).for_linear("x")
        if linear.weight is None:
            continue
        for N, K in SHAPES["llama-3-8b"].values():
            normal, outliers = linear.split(K)
            units = -(-normal // UNIT) - -(outliers // -OUTLIER_UNIT)
            for tokens in {token_bucket(count) for count in DEFAULT_TOKENS}:
                kind = weight_kind(linear)
                found[choose_config(kind, token_scales(linear), tokens, N, units, outliers > 0)] = None
    return [config for config in found if config not in chosen()]


@pytest.mark.slow
@needs_dsl
@pytest.mark.skipif("ATOM_EVERY_KERNEL" not in os.environ, reason="takes four minutes; set ATOM_EVERY_KERNEL=1")
@pytest.mark.parametrize("config", others(), ids=name_of)
def test_machine_code(config: GemmConfig, tmp_path: Path) -> None:
    check_machine_code(config, tmp_path)
