"""The pages name everything that the registries hold."""

from pathlib import Path

import pytest

from atom.checkpoint import INDEX_FILE, REPORT_FILE, RUN_FILE, VERSION
from atom.quant.formats import FORMATS
from atom.quant.presets import PRESETS
from atom.quant.schemes import SCALE_FORMATS
from atom.quant.stored import stored_tensors

from .cases import LINEARS

DOCS = Path(__file__).parents[2] / "docs"


def test_checkpoint_page_names_every_file_tensor_and_format() -> None:
    page = (DOCS / "checkpoint.md").read_text(encoding="utf-8")
    tensors = {name for linear in LINEARS.values() for name in stored_tensors(8, 64, linear, has_input_perm=True)}
    formats = [f.name for f in FORMATS.values() if f.kind != "exponent"]
    for name in (*tensors, *formats, *SCALE_FORMATS, INDEX_FILE, REPORT_FILE, RUN_FILE):
        assert f"`{name}`" in page, name
    assert f"version {VERSION}\n" in page


@pytest.mark.parametrize("name", PRESETS)
def test_numerics_page_states_effective_bits(name: str) -> None:
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 7)
    scheme = PRESETS[name]
    stated = [float(bits) for bits in row.split("|")[-2].split("/")]
    expected = [scheme.weight_bits(4096), scheme.activation_bits(4096), scheme.kv_bits(128)]
    assert stated == pytest.approx(expected, abs=0.0051)


def test_numerics_page_names_every_format() -> None:
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*FORMATS, *SCALE_FORMATS))
