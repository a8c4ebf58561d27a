"""The package list, the layering of imports, and that importing atom is cheap."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = ("calibration", "eval", "serving")  # folders of the checkout that are sub-packages of atom

# Each package may import those before it, and itself; the commands import everything.
LAYERS = ["quant", "kernels", "models", "calibration", "serving", "eval"]
# Modules of atom/ itself, and what they may import of the packages above.
SHARED = {
    "circumstances": (),
    "closing": (),
    "errors": (),
    "env": (),
    "plots": (),
    "records": (),
    "record_tables": (),
    "texts": (),
    "checkpoint": ("quant",),
}
HEAVY = (
    "transformers",
    "datasets",
    "lm_eval",
    "matplotlib",
    "cutlass",
    "tyro",
    "rich",
    "pyarrow",
    "gguf",
)


def folder_of(package: str) -> Path:
    return ROOT / package if package in TOP_LEVEL else ROOT / "atom" / package


def sources() -> list[tuple[str, Path]]:
    """(package, file) of every module below atom, top-level folders included."""
    return [(p, file) for p in LAYERS if folder_of(p).is_dir() for file in sorted(folder_of(p).rglob("*.py"))]


def imported_packages(package: str, file: Path) -> set[str]:
    """The packages of atom that a file imports anywhere, also inside functions."""
    depth = len(file.relative_to(folder_of(package)).parts)  # 1 for a module directly in the package
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:  # from ..quant import ...
            names = ["atom." + (node.module or "")]
        found |= {name.split(".")[1] for name in names if name.startswith("atom.")}
    return found


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {"atom"}
    for init in (ROOT / "atom").rglob("__init__.py"):
        on_disk.add(".".join(init.parent.relative_to(ROOT).parts))
    for folder in TOP_LEVEL:
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add("atom." + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == on_disk


@pytest.mark.parametrize(("package", "file"), sources(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_imports_point_downwards(package: str, file: Path) -> None:
    allowed = {*LAYERS[: LAYERS.index(package) + 1], *SHARED}
    if package == "eval":
        allowed.discard("calibration")  # calibration and serving meet only in the checkpoint
    if package == "serving":
        allowed -= {"calibration", "eval"}
    assert imported_packages(package, file) <= allowed


def imported_files(file: Path) -> set[Path]:
    """The files that a file imports by relative imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            asked = (start, *(start / alias.name for alias in node.names))
            found |= {path.with_suffix(".py") for path in asked if path.with_suffix(".py").is_file()}
    return found - {file}


# In serving a sequence and the decode that it takes part in name each other.
@pytest.mark.parametrize("package", [package for package in LAYERS if package != "serving"])
def test_imports_make_no_circle(package: str) -> None:
    """graphlib's CycleError names the circle."""
    files = sorted(folder_of(package).rglob("*.py"))
    assert len(files) > 5
    TopologicalSorter({file: imported_files(file) for file in files}).prepare()


@pytest.mark.parametrize("module", sorted(SHARED))
def test_shared_modules_import_only_what_they_may(module: str) -> None:
    file = ROOT / "atom" / f"{module}.py"
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found.add(node.module.split(".")[0])
    assert found - set(SHARED) <= set(SHARED[module])


def test_importing_atom_is_lean() -> None:
    """No heavy package, and no CUDA, before something needs it."""
    code = (
        "import sys, atom, atom.cli, atom.quant.presets, atom.kernels.registry, atom.checkpoint\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "import torch; print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_runs_uninstalled_from_the_checkout() -> None:
    """`python -m atom` and the top-level folders work with nothing but the checkout on the path."""
    code = "import atom.calibration, atom.serving, atom.eval; print(atom.calibration.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_bare_environment(), check=True)
    assert Path(done.stdout.strip()) == ROOT / "calibration" / "__init__.py"


def _bare_environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_wheel_holds_every_package(tmp_path: Path) -> None:
    """A built wheel maps calibration/, serving/ and eval/ to atom.calibration, atom.serving and atom.eval."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel offline needs setuptools>=77")
    copy = tmp_path / "checkout"  # so that the build leaves nothing behind here
    for name in ("atom", *TOP_LEVEL):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "atom/cli.py",
        "atom/quant/rounding.py",
        "atom/calibration/gptq.py",
        "atom/serving/scheduler.py",
        "atom/serving/openai/chat.py",
        "atom/serving/page/index.html",
        "atom/eval/lm.py",
        "atom/py.typed",
    ):
        assert expected in names
