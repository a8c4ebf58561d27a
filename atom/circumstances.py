"""How, when and on what a number came about: the command, commit, machine and versions beside every measurement."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent

_ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:[^/\s=,]+/)+")  # the folders of an absolute path, not of a URL


def circumstances(machine: str) -> dict[str, Any]:
    """When, by which command, on what and with what this process measures: a record's fields beside its rows."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "machine": {"name": machine, **machine_facts(gpu=machine != "cpu")},
        "versions": package_versions(),
    }


def command_line() -> str:
    """This process's command as a user would type it; of absolute paths only the last part stays."""
    program, *arguments = sys.argv
    path = Path(program)
    name = path.name
    if path.suffix == ".py" and path.is_file():
        inside = path.resolve().is_relative_to(CHECKOUT)
        name = "python " + (str(path.resolve().relative_to(CHECKOUT)) if inside else path.name)
    main = sys.modules["__main__"]
    if main.__spec__ is not None and program == main.__file__:  # run by -m, as some files have to be
        name = f"python -m {main.__spec__.name.removesuffix('.__main__')}"
    return " ".join([name, *(shlex.quote(_ABSOLUTE.sub("", a)) for a in arguments)])


def current_commit() -> str:
    """The checkout's commit, "-dirty" appended if tracked files differ from it, or "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


def _git(*arguments: str) -> str:
    if not (CHECKOUT / ".git").exists():  # an installed package must not report some outer repository's commit
        raise OSError("not a checkout")
    done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of what decides a number: Python, torch and the packages around it that are installed."""
    names = ("atom-serving", "torch", "transformers", "tokenizers", "lm_eval", "datasets")
    packages = {name: name for name in names} | {"nvidia-cutlass-dsl": "nvidia-cutlass-dsl-libs-cu13"}
    found = {"python": platform.python_version()}
    for name, package in packages.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts(gpu: bool = False) -> dict[str, Any]:
    """Processor, cores and memory; with gpu=True (which starts CUDA) also the GPU's name, memory, driver, CUDA."""
    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if gpu:
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
        driver = _driver_version()
        if driver is not None:
            facts["driver"] = driver
    return facts


def _driver_version() -> str | None:
    """Of the first GPU; None where nvidia-smi is not at hand."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
