"""Model shapes by name or config file, so that a 7B or 70B model is bounded or measured without its weights."""

import json
from pathlib import Path
from typing import Any

from atom.models.config import ModelConfig
from atom.models.dummy import SHAPES
from atom.models.family import model_config


def read_shape(name: str) -> tuple[str, dict[str, Any]]:
    """(what records call it, its config.json): a name in SHAPES, a config.json, or a directory that holds one.

    Raises ValueError if it is none of these.
    """
    if name in SHAPES:
        return name, SHAPES[name]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return (file.resolve().parent.name if file.name == "config.json" else file.stem), raw
    raise ValueError(f"no shape {name!r}; use one of {', '.join(SHAPES)}, a config.json, or a model's directory")


def shape_config(name: str) -> ModelConfig:
    """The shape called `name` as a model's config."""
    return model_config(read_shape(name)[1])
