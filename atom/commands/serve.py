"""Serve a model over HTTP, as the OpenAI API.

Example: atom serve smollm2-w4a4 --port 8000
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from atom.serving.engine_config import EngineConfig
from atom.serving.server_config import ServerConfig

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Options:
    """Options of `atom serve`."""

    model: Annotated[str, tyro.conf.Positional]
    """Atom checkpoint, model directory, hub id, GGUF file, or the alias smollm2."""

    server: Annotated[ServerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ServerConfig)
    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EngineConfig)


def run(options: Options) -> dict[str, Any]:
    """Serve until a signal comes. AtomError if the port is taken, the model cannot be served, or the engine died."""
    try:
        from atom.serving.process import serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"atom serve needs the package {error.name}, which is not installed; pip install 'atom-serving[serving]'"
        ) from None
    from .console import progress_console

    with progress_console.status("starting") as status:
        served: dict[str, Any] = serve(options.model, options.engine, options.server, status.update, status.stop)
        return served
