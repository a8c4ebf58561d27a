"""Windows of calibration text: what is drawn, and what is said when the text cannot be used."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.calibration.config import CalibrationConfig
from atom.calibration.data import HUB_DATASETS, hash_tokens, load_windows
from atom.errors import CalibrationError

BOS = 256


class ByteTokenizer:
    """One token a byte; begins every text with BOS if asked to."""

    def __init__(self, adds_bos: bool = False) -> None:
        self.bos_token_id: int | None = BOS
        self._adds_bos = adds_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * (self._adds_bos and add_special_tokens) + list(text.encode())


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("", b" = Title = \n\nfirst line\nsecond line\n"),  # as it stands
        ("wikitext2=", b" = Title = \n\n\n\n\nfirst line\n\n\nsecond line\n"),  # as the hub's rows are joined
    ],
)
def test_windows_are_pieces_of_the_text(prefix: str, text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" = Title = \n\nfirst line\nsecond line\n")
    windows = load_windows(prefix + str(path), ByteTokenizer(), 20, 12, seed=0)
    assert windows.tokens.shape == (20, 12)
    for window in windows.tokens.tolist():
        assert bytes(window) in text
    starts = [random.Random(0).randrange(len(text) - 12 + 1)]
    assert bytes(windows.tokens[0].tolist()) == text[starts[0] : starts[0] + 12]
    assert (windows.source, windows.sha256) == (prefix + "a.txt", hash_tokens(windows.tokens))


def test_seed_decides(text_file: Path) -> None:
    draw = [load_windows(str(text_file), ByteTokenizer(), 8, 32, seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0].tokens, draw[1].tokens)
    assert draw[0].sha256 == draw[1].sha256 != draw[2].sha256


def test_bos_begins_each_window_where_the_tokenizer_adds_it(text_file: Path) -> None:
    tokens = load_windows(str(text_file), ByteTokenizer(adds_bos=True), 8, 32, 0).tokens
    assert tokens.shape == (8, 32)
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1:] != BOS).all()


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    rows = ["one two three", "four five", "six"]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="parquet is read with pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": rows}), path)
    else:
        text = "\n".join(rows if ".txt" in suffix else [json.dumps({"text": row}) for row in rows])
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    whole = load_windows(str(path), ByteTokenizer(), 1, 20, 0).tokens
    joined = "\n" if ".txt" in suffix else "\n\n"  # a text file is taken as it stands, rows get a blank line
    assert bytes(whole[0].tolist()) in joined.join(rows).encode()


def test_hub_datasets_are_joined_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="hub datasets are read with the package datasets")
    asked: list[dict[str, Any]] = []

    def fake(**options: Any) -> list[dict[str, str]]:
        asked.append(options)
        return [{"text": "abc"}, {"text": ""}, {"text": "def"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for name in HUB_DATASETS:
        assert bytes(load_windows(name, ByteTokenizer(), 1, 10, 0).tokens[0].tolist()) == b"abc\n\n\n\ndef"
    assert [options["path"] for options in asked] == [
        "Salesforce/wikitext",
        "allenai/c4",
        "mit-han-lab/pile-val-backup",
    ]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="hub datasets are read with the package datasets")

    def fail(**options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        CalibrationError, match=r"wikitext2 could not be loaded.*no route.*local copy as wikitext2=FILE, or `self`"
    ):
        load_windows("wikitext2", ByteTokenizer(), 1, 10, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none\.txt does not exist"),
        ("empty.txt", b"", r"empty\.txt holds no text"),
        ("blank.txt", b"\n \n\n", r"blank\.txt holds no text"),
        ("short.txt", b"too short", r"short\.txt is too short: it has 9 tokens, one window needs 64"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 50, r"latin\.txt is not UTF-8 .*iconv"),
        ("torn.txt.gz", gzip.compress(b"words " * 500, mtime=0)[:30], r"torn\.txt\.gz .*not a whole gzip file"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', r"broken\.jsonl, line 2 is not JSON"),
        ("numbers.jsonl", b'{"a": 1}\n', r"numbers\.jsonl, line 1 has no field 'text'"),
        ("broken.parquet", b"PAR1 and no more", r"broken\.parquet is not a readable parquet file"),
        (
            "words.pdf",
            b"words " * 50,
            r"unknown calibration data .*wikitext2, c4, pile, self.*\.txt, \.jsonl, \.parquet",
        ),
    ],
)
def test_unusable_text(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_windows(str(tmp_path / name), ByteTokenizer(), 4, 64, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"window_length": 1}, "window_length must be at least 2 tokens, got 1"),
        ({"damping": 0.0}, "damping is a share between 0 and 1, got 0.0"),
        ({"offload": "maybe"}, "offload must be auto, on or off, got 'maybe'"),
        ({"matmul_precision": "low"}, "matmul_precision must be highest or high, got 'low'"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**options)


def test_config_round_trip() -> None:
    config = CalibrationConfig(calib="c4", windows=3, gptq=False)
    assert CalibrationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="does not know act_ordre; it has calib"):
        CalibrationConfig.from_dict({"act_ordre": True})
