"""Evaluation texts: the published sets by name, and local files under the same protocol.

`wikitext2` loads the set from the hub; `FILE` is a text as it stands; `wikitext2=FILE` reads a local
copy under the set's own protocol and name. The protocols are those of the GPTQ paper's code, as in published tables.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from atom.texts import is_text_file, read_hub_rows, read_rows, read_text


@dataclass(frozen=True)
class Protocol:
    """How one published set becomes one text: which rows of the hub's copy, and what joins them."""

    hub: dict[str, Any] = field(default_factory=dict)
    separator: str = "\n\n"
    max_rows: int | None = None


PROTOCOLS: dict[str, Protocol] = {
    "wikitext2": Protocol({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}),
    "ptb": Protocol(
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"}, separator=" "
    ),
    "c4": Protocol(
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        separator=" ",
        max_rows=1100,
    ),
}


@dataclass(frozen=True)
class Text:
    """One text to measure on.

    name    what results call it: the set's name, or the file's without its endings
    source  hub id or file name
    sha256  of the text's UTF-8 bytes
    """

    name: str
    source: str
    text: str = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(name: str) -> Text:
    """The text that `name` asks for: a set (wikitext2, ptb, c4), a file, or SET=FILE.

    Raises ValueError for an unknown name or unusable rows, FileNotFoundError for a missing file, and
    UnsupportedError where the hub cannot be reached or `datasets` is not installed.
    """
    known, _, file = name.partition("=")
    if file and known in PROTOCOLS:
        return _join(known, Path(file).name, read_rows(Path(file)), PROTOCOLS[known])
    if name in PROTOCOLS:
        protocol = PROTOCOLS[name]
        return _join(name, protocol.hub["path"], read_hub_rows(name, protocol.hub, protocol.max_rows), protocol)
    path = Path(name)
    if is_text_file(path.name):
        stem = path.name.removesuffix(".gz")
        return Text(stem.rpartition(".")[0] or stem, path.name, read_text(path))
    raise ValueError(
        f"unknown text {name!r}; give one of {', '.join(PROTOCOLS)}, a .txt, .jsonl or .parquet file, or SET=FILE to "
        "measure a local copy of a set under its name"
    )


def _join(name: str, source: str, rows: Iterable[str], protocol: Protocol) -> Text:
    text = protocol.separator.join(islice(rows, protocol.max_rows))
    if not text.strip():
        raise ValueError(f"{source} holds no text; give a file with running text")
    return Text(name, source, text)
