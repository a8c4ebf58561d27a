"""The compiled-kernel cache: compiled once, also by processes that start together; keyed by all that matters."""

import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from atom.errors import UnsupportedError
from atom.kernels import cache
from atom.kernels.compile_workers import CompileError

from .machine_code import needs_dsl


class Compiled:
    """What a compiler returns: something that exports an object file."""

    def export_to_c(self, path: str, symbol: str) -> None:
        source = Path(path).with_suffix(".c")
        source.write_text(f"int {symbol}(void) {{ return 7; }}\n")
        subprocess.run(["cc", "-fPIC", "-c", "-o", path, str(source)], check=True)


def compile_and_count(log: Path) -> Compiled:
    with log.open("a") as file:
        file.write("compiled\n")
    return Compiled()


def fill(folder: str, log: str) -> None:
    import os

    os.environ["ATOM_CACHE"] = folder
    cache._library("kernel", "key", partial(compile_and_count, Path(log)), "sm_90a")


needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to link with")


@needs_cc
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [get_context("spawn").Process(target=fill, args=(str(tmp_path), str(log))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text().splitlines() == ["compiled"]
    assert [p.name for p in (tmp_path / "kernels").glob("*.so")] == ["kernel-key.so"]


@needs_cc
def test_a_failed_compile_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path))

    def fail() -> Compiled:
        raise RuntimeError("ptxas says no")

    with pytest.raises(RuntimeError, match="ptxas"):
        cache._library("kernel", "key", fail, "sm_90a")
    assert not list((tmp_path / "kernels").glob("*.so"))
    fill(str(tmp_path), str(tmp_path / "log"))
    assert (tmp_path / "kernels" / "kernel-key.so").exists()


def test_key_follows_sources_config_arch_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_version", lambda package: "1")
    monkeypatch.setattr(cache, "HERE", tmp_path)
    for name in ("k", "other"):
        (tmp_path / f"{name}.py").write_text("a")
    keys = [cache.kernel_key("k", 1, "sm_90a"), cache.kernel_key("k", 2, "sm_90a")]
    keys += [cache.kernel_key("k", 1, "sm_100a"), cache.kernel_key("other", 1, "sm_90a")]
    (tmp_path / "k.py").write_text("b")
    keys.append(cache.kernel_key("k", 1, "sm_90a"))
    monkeypatch.setattr(cache, "_version", lambda package: "2")
    keys.append(cache.kernel_key("k", 1, "sm_90a"))
    assert len(set(keys)) == len(keys)
    assert cache.kernel_key("k", 1, "sm_90a") == keys[-1]


def test_key_follows_what_the_module_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the import is written, and through other files; not what lies outside the folder."""
    folder = tmp_path / "kernels"
    (folder / "dsl").mkdir(parents=True)
    texts = {
        "k.py": "from .rows import (\n    Rows,\n)\nfrom . import config\nfrom ..quant import formats\nimport rows2\n",
        "rows.py": "def f():\n    from .dsl.memory import load\n",
        "dsl/memory.py": "from .words import Word\nfrom ..config import C\n",
        "dsl/words.py": "",
        "config.py": "",
        "rows2.py": "",
        "../quant.py": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    wanted = {"k.py", "rows.py", "dsl/memory.py", "dsl/words.py", "config.py"}
    assert {str(path.relative_to(folder)) for path in cache.kernel_sources(folder / "k.py")} == wanted
    monkeypatch.setattr(cache, "_version", lambda package: "1")
    monkeypatch.setattr(cache, "HERE", folder)
    before = cache.kernel_key("k", 1, "sm_90a")
    (folder / "dsl/words.py").write_text("Word = 1\n")
    assert cache.kernel_key("k", 1, "sm_90a") != before


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PACKAGES", {"the DSL": "atom-no-such-package"})
    with pytest.raises(UnsupportedError, match=r"need atom-no-such-package, .*atom-serving\[kernels\].*reference"):
        cache.kernel_key("producers_sm90", 1, "sm_90a")


def test_the_extra_installs_what_kernels_need() -> None:
    """Nothing that the error above would not bring: pip would go round in circles."""
    text = (Path(cache.__file__).parents[2] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["kernels"]
    assert set(cache.PACKAGES.values()) <= {requirement.partition("==")[0] for requirement in extra}


@needs_dsl
def test_the_dsl_is_found_without_its_pth_file() -> None:
    code = """
import sys
sys.path = [entry for entry in sys.path if not entry.endswith("dsl_packages")]
import importlib.util
assert importlib.util.find_spec("cutlass") is None
from atom.kernels.cache import _find_dsl
_find_dsl(), _find_dsl()
assert importlib.util.find_spec("cutlass") is not None
assert sum(entry.endswith("dsl_packages") for entry in sys.path) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(cache.__file__).parents[2])


@needs_cc
def test_jobs_run_together_and_report(tmp_path: Path) -> None:
    log = tmp_path / "log"
    counts: list[int] = []
    cache.compile_together([partial(fill, str(tmp_path / str(i)), str(log)) for i in range(3)], 2, counts.append)
    assert counts == [1, 2, 3] and len(log.read_text().splitlines()) == 3


def refuse() -> None:
    raise ValueError("ptxas says no")


def vanish() -> None:
    os._exit(9)


def test_a_job_that_fails_ends_the_run_with_its_reason() -> None:
    with pytest.raises(CompileError, match="ValueError: ptxas says no"):
        cache.compile_together([refuse, *[partial(print)] * 3], 1)


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(CompileError, match="ended with code 9"):
        cache.compile_together([vanish], 1)


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """Workers do not run the user's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from atom.kernels.cache import compile_together\n"
        "print('once')\n"
        "compile_together([partial(print, 'chatter of a compiler')] * 3, 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["once"]
