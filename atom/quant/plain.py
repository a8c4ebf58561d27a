"""Frozen dataclasses as JSON objects, and back: what a scheme's parts have in common when they are written.

A key that nobody knows is refused, never dropped: a newer version may have meant something by it.
"""

from dataclasses import fields
from typing import Any, Self

from .granularity import Granularity


class Plain:
    """A dataclass whose fields are JSON values already."""

    def to_dict(self) -> dict[str, Any]:
        return plain_fields(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        refuse_unknown(cls, data)
        return cls(**data)


def plain_fields(value: Any, idle: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of `value` for JSON.

    idle  what only some have: left out where it is empty, so that the others read as before it was there
    """
    found = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return {name: item for name, item in found.items() if item or name not in idle}


def refuse_unknown(cls: type, data: dict[str, Any]) -> None:
    """Raise ValueError unless `data` is an object of keys that `cls` has."""
    if not isinstance(data, dict):
        raise ValueError(f"a {cls.__name__} is a JSON object, got {data!r}; quantize again")
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} does not know {', '.join(unknown)}; it has {', '.join(known)}. "
            "A newer version of Atom may have written this: upgrade, or quantize again."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Granularity):
        return str(value)
    return value.to_dict() if hasattr(value, "to_dict") else value
