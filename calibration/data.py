"""Calibration text: where it comes from, and the windows of tokens that are drawn from it.

The rows of a dataset are joined by a blank line, a .txt file is taken as it stands; the text is tokenised once
without special tokens, and cut into windows at places drawn from the seed. A tokenizer that begins every text with a
BOS token has it at the start of each window, as in evaluation. The sha256 of the tokens goes into the report.
"""

import hashlib
import random
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from atom.errors import CalibrationError
from atom.texts import SUFFIXES, is_text_file, read_rows, read_text

HUB_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
        "streaming": True,
    },
    "pile": {"path": "mit-han-lab/pile-val-backup", "split": "validation", "streaming": True},
}
SELF = "self"
MAX_STREAMED_ROWS = 5_000  # of c4 and pile, which are far larger; 128 windows of 2048 tokens need about 1,000


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Windows:
    """Calibration tokens and where they came from.

    tokens   [num_windows, window_length]   int64
    source   name of the dataset or file
    sha256   of the tokens as little-endian int64
    """

    tokens: torch.Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, tokens: torch.Tensor, source: str) -> "Windows":
        return cls(tokens, source, hash_tokens(tokens))


def load_windows(data: str, tokenizer: Tokenizer, num_windows: int, window_length: int, seed: int) -> Windows:
    """Draw `num_windows` windows of `window_length` tokens from the text that `data` names.

    Raises CalibrationError if the text is missing, empty, too short, damaged or not UTF-8.
    Source: the sampling of GPTQ, arXiv:2210.17323: starts drawn uniformly, windows may overlap.
    """
    text = read_calibration_text(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the text is longer than the model's context, as it should be
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
    bos = [] if (token := window_bos(tokenizer)) is None else [token]
    body = window_length - len(bos)
    if len(ids) < body:
        raise CalibrationError(
            f"{data} is too short: it has {len(ids):,} tokens, one window needs {body:,}, and {num_windows} windows "
            f"draw best from {num_windows * window_length:,} or more; use a longer text or a smaller --window-length"
        )
    draw = random.Random(seed)
    starts = [draw.randrange(len(ids) - body + 1) for _ in range(num_windows)]
    tokens = torch.stack([torch.cat([torch.tensor(bos, dtype=torch.int64), ids[s : s + body]]) for s in starts])
    known, _, file = data.rpartition("=")
    return Windows.of(tokens, f"{known}={Path(file).name}".lstrip("=") if is_text_file(file) else data)


def window_bos(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, or None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def hash_tokens(tokens: torch.Tensor) -> str:
    """sha256 of the tokens as little-endian int64, in hexadecimal."""
    return hashlib.sha256(tokens.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def read_calibration_text(data: str) -> str:
    """The text of a dataset, of a file, or of a local copy of a dataset (wikitext2=FILE). Raises CalibrationError.

    Rows of a dataset are joined by a blank line; a .txt file is taken as it stands.
    """
    if data in HUB_DATASETS:
        return "\n\n".join(_hub_rows(data))
    known, _, file = data.rpartition("=")
    if not is_text_file(file) or known not in ("", *HUB_DATASETS):
        raise CalibrationError(
            f"unknown calibration data {data!r}; use one of {', '.join(HUB_DATASETS)}, {SELF}, "
            f"a file ending in {', '.join(SUFFIXES)} (each also with .gz), or wikitext2=FILE for a local copy"
        )
    try:
        return "\n\n".join(read_rows(Path(file))) if known else read_text(Path(file))
    except (ValueError, OSError) as error:
        raise CalibrationError(f"calibration text: {error}") from error


def _hub_rows(data: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"calibration data {data} needs the package datasets, which is not installed; "
            "pip install 'atom-serving[calibration]', or give a local file"
        ) from None
    try:
        rows = datasets.load_dataset(**HUB_DATASETS[data])
        return [row["text"] for row in islice(rows, None if data == "wikitext2" else MAX_STREAMED_ROWS)]
    except Exception as error:
        raise CalibrationError(
            f"{data} could not be loaded from the hub ({type(error).__name__}: {error}); "
            f"check the network, or give a local text file, or `{SELF}` for text that the model writes"
        ) from error
