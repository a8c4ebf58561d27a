"""Evaluation texts: names, protocols, and the way to a local copy where there is no hub."""

import sys
from pathlib import Path

import pytest

from atom.errors import UnsupportedError
from atom.eval.texts import load_text


def test_file_and_set_under_their_protocols(tmp_path: Path) -> None:
    path = tmp_path / "valid.part1.txt"
    path.write_text("one\n\ntwo\n")
    plain, wiki, ptb = (load_text(prefix + str(path)) for prefix in ("", "wikitext2=", "ptb="))
    assert (plain.name, wiki.name, ptb.name) == ("valid.part1", "wikitext2", "ptb")
    assert (plain.text, wiki.text) == ("one\n\ntwo\n", "one\n\n\n\n\ntwo\n")
    assert ptb.text == "one\n  two\n"
    assert plain.source == "valid.part1.txt" and len({plain.sha256, wiki.sha256, ptb.sha256}) == 3


def test_unknown_and_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown text 'wikitext'; give one of wikitext2, ptb, c4, a"):
        load_text("wikitext")
    with pytest.raises(FileNotFoundError, match=r"none.txt does not exist"):
        load_text(f"c4={tmp_path / 'none.txt'}")


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"pip install datasets, or give a local copy as ptb=FILE"):
        load_text("ptb")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(**_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UnsupportedError, match=r"could not be loaded from the hub \(ConnectionError: no route\)"):
        load_text("wikitext2")
