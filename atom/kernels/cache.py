"""Compiled kernels on disk: compile once, load in a millisecond ever after.

A kernel is exported as an object file, linked into a shared library and loaded through TVM-FFI: a warm start neither
compiles nor imports cutlass. The key is a hash of the sources, the DSL's and TVM-FFI's versions, the architecture and
the kernel's config. (Not of the driver: what is stored is machine code for one architecture, which every driver from
the DSL's minimum on runs.) Concurrent processes are safe: one compiles under a file lock, the others wait for it, and
a library appears under its name only when it is complete.
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from atom.env import cache_dir
from atom.errors import UnsupportedError

from .compile_workers import run_jobs

SYMBOL = "atom_kernel"
HERE = Path(__file__).parent
IMPORT = re.compile(r"^\s*from (\.+)([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)
DSL = "nvidia-cutlass-dsl-libs-cu13"
PACKAGES = {"nvidia-cutlass-dsl": DSL, "apache-tvm-ffi": "apache-tvm-ffi"}  # in keys, and whose version that is
_loaded: dict[str, Any] = {}
_lock = threading.Lock()
_runtime: list[ctypes.CDLL] = []


def load_kernel(name: str, config: object, compile: Callable[[], Any], arch: str) -> Any:
    """The compiled kernel of module `name` in `config`, from memory, from disk, or compiled now.

    name     of the module of atom/kernels that holds the device code
    config   a value whose repr tells everything that `compile` depends on besides that code
    compile  returns a TVM-FFI compiled function with `export_to_c`
    returns  a TVM-FFI function
    Raises UnsupportedError where the compiler's packages are missing.
    """
    key = kernel_key(name, config, arch)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _open(_library(name, key, compile, arch))
        return _loaded[key]


def kernel_key(name: str, config: object, arch: str) -> str:
    """Hash of all that a kernel's machine code depends on."""
    digest = hashlib.sha256()
    for part in (name, repr(config), arch, *(f"{name} {_version(package)}" for name, package in PACKAGES.items())):
        digest.update(part.encode() + b"\0")
    for source in kernel_sources(HERE / f"{name}.py"):
        digest.update(source.name.encode() + b"\0" + _text(source, source.stat().st_mtime_ns) + b"\0")
    return digest.hexdigest()[:24]


def kernel_sources(module: Path) -> list[Path]:
    """The files that a kernel's code may stand in: its module and what that imports, as far as it lies beside it."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += _imported(source, module.parent, source.stat().st_mtime_ns)
    return sorted(found)


@lru_cache
def _imported(source: Path, folder: Path, changed: int) -> list[Path]:
    """The files of `folder` and its subfolders that a file imports by relative imports."""
    found = []
    for dots, module, names in IMPORT.findall(_text(source, changed).decode()):
        start = source.parents[len(dots) - 1].joinpath(*module.split(".")) if module else source.parents[len(dots) - 1]
        asked = [start, *(start / name for name in re.findall(r"\w+", names))]
        found += [path.with_suffix(".py") for path in asked if path.with_suffix(".py").is_file()]
    return [path for path in found if folder in path.parents]


@lru_cache
def _text(source: Path, changed: int) -> bytes:
    """A file as it was at a time: a model has hundreds of kernels of a few files."""
    return source.read_bytes()


def kernel_path(name: str, key: str) -> Path:
    return cache_dir() / "kernels" / f"{name}-{key}.so"


def compile_together(
    jobs: Sequence[Callable[[], Any]], workers: int | None = None, done: Callable[[int], Any] = lambda count: None
) -> None:
    """Run jobs that fill the cache (partial(gemm_kernel, config), say) in processes of their own; see run_jobs.

    jobs     picklable; what they return is dropped
    workers  default: the CPUs, at most 16 (a process takes about 1 GB)
    done     told after each job how many are finished, for a progress bar
    """
    if jobs:
        run_jobs(jobs, min(workers or os.cpu_count() or 1, 16, len(jobs)), done)


def _library(name: str, key: str, compile: Callable[[], Any], arch: str) -> Path:
    path = kernel_path(name, key)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # another process may have compiled it while this one waited
            os.environ.setdefault("CUTE_DSL_ARCH", arch)  # the DSL reads it when it is first imported
            _find_dsl()
            compiled = compile()
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = _link(compiled, Path(scratch))
                os.replace(built, path)
    return path


def _find_dsl() -> None:
    """Let `import cutlass` find the DSL.

    Its own package `nvidia-cutlass-dsl` does so by a .pth file, and would install the libraries of CUDA 12 as well.
    """
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    if importlib.util.find_spec("cutlass") is None and found is not None:
        sys.path.insert(0, str(Path(next(iter(found.submodule_search_locations or ()))) / "dsl_packages"))


def _link(compiled: Any, scratch: Path) -> Path:
    linker = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or shutil.which("ld")
    if linker is None:
        raise UnsupportedError(
            "no linker found to store a compiled kernel; cc, gcc, clang or ld is needed; install one (apt install gcc)"
        )
    compiled.export_to_c(str(scratch / "kernel.o"), SYMBOL)
    built = scratch / "kernel.so"
    subprocess.run([linker, "-shared", "-o", str(built), str(scratch / "kernel.o")], check=True, capture_output=True)
    return built


def _open(path: Path) -> Any:
    import tvm_ffi

    if not _runtime:
        _runtime.append(ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL))
    return tvm_ffi.load_module(str(path))[SYMBOL]


def kept_argument(tensor: Tensor) -> Any:
    """A tensor that a kernel is called with again and again, in the form in which calls take it fastest.

    It shares the tensor's memory and keeps it alive. Converting a torch tensor costs a third of a microsecond a call;
    one torch tensor a call must have, from whose device it takes torch's stream. On the CPU: the tensor itself.
    """
    if tensor.device.type != "cuda":
        return tensor
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor)


def runtime_library() -> Path:
    """The DSL's runtime, found without importing the DSL."""
    try:
        files = importlib.metadata.files(DSL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libcute_dsl_runtime.so" and "stubs" not in file.parts:
            return Path(str(file.locate()))
    raise _missing(DSL)


@lru_cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(package) from None


def _missing(package: str) -> UnsupportedError:
    return UnsupportedError(
        f"the GPU kernels need {package}, which is not installed; pip install 'atom-serving[kernels]', or ask for "
        "--kernels reference"
    )
