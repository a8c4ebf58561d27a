"""Calibration text: where it comes from, and the windows of tokens that are drawn from it.

The rows of a dataset are joined by a blank line, a .txt file is taken as it stands; the text is tokenised once
without special tokens, and cut into windows at places drawn from the seed. A tokenizer that begins every text with a
BOS token has it at the start of each window, as in evaluation. The sha256 of the tokens goes into the report.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from atom.errors import CalibrationError, UnsupportedError
from atom.models.tokens import Tokenizer, encode_plain, leading_bos
from atom.texts import SUFFIXES, is_text_file, read_hub_rows, read_rows, read_text

HUB_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    },
    "pile": {"path": "mit-han-lab/pile-val-backup", "split": "validation"},
}
SELF = "self"
MAX_ROWS = {"c4": 5_000, "pile": 5_000}  # of far larger sets; 128 windows of 2048 tokens need about 1,000


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


def load_windows(
    data: str,
    tokenizer: Tokenizer,
    num_windows: int,
    window_length: int,
    seed: int,
    part: tuple[float, float] = (0.0, 1.0),
) -> Windows:
    """Draw `num_windows` windows of `window_length` tokens from the text that `data` names.

    part  where in the text, as shares of its length
    Raises CalibrationError if the text is missing, empty, too short, damaged or not UTF-8.
    Source: the sampling of GPTQ, arXiv:2210.17323: starts drawn uniformly, windows may overlap.
    """
    ids = _tokenise(data, tokenizer)
    ids = ids[int(part[0] * len(ids)) : int(part[1] * len(ids))]
    bos = [] if (token := leading_bos(tokenizer)) is None else [token]
    body = window_length - len(bos)
    if len(ids) < body:
        raise CalibrationError(
            f"{data} is too short: it has {len(ids):,} tokens, one window needs {body:,}, and {num_windows} windows "
            f"draw best from {num_windows * window_length:,} or more; use a longer text or a smaller --window-length"
        )
    draw = random.Random(seed)
    starts = [draw.randrange(len(ids) - body + 1) for _ in range(num_windows)]
    tokens = torch.stack([torch.cat([torch.tensor(bos, dtype=torch.int64), ids[s : s + body]]) for s in starts])
    known, file = _split(data)
    return Windows.of(tokens, f"{known}={Path(file).name}".lstrip("=") if is_text_file(file) else data)


@lru_cache(maxsize=1)
def _tokenise(data: str, tokenizer: Tokenizer) -> torch.Tensor:
    """All tokens of the text that `data` names; the last text's are kept, since its windows are drawn several times."""
    return torch.tensor(encode_plain(tokenizer, read_calibration_text(data)), dtype=torch.int64)


def hash_tokens(tokens: torch.Tensor) -> str:
    """sha256 of the tokens as little-endian int64, in hexadecimal."""
    return hashlib.sha256(tokens.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def read_calibration_text(data: str) -> str:
    """The text of a dataset, of a file, or of a local copy of a dataset (wikitext2=FILE). Raises CalibrationError.

    Rows of a dataset are joined by a blank line; a .txt file is taken as it stands.
    """
    known, file = _split(data)
    if data not in HUB_DATASETS and not is_text_file(file):
        raise CalibrationError(
            f"unknown calibration data {data!r}; use one of {', '.join(HUB_DATASETS)}, {SELF}, "
            f"a file ending in {', '.join(SUFFIXES)} (each also with .gz), or wikitext2=FILE for a local copy"
        )
    try:
        if data in HUB_DATASETS:
            return "\n\n".join(read_hub_rows(data, HUB_DATASETS[data], MAX_ROWS.get(data)))
        return "\n\n".join(read_rows(Path(file))) if known else read_text(Path(file))
    except (UnsupportedError, ValueError, OSError) as error:
        own = f", or `{SELF}` for text that the model writes" if data in HUB_DATASETS else ""
        raise CalibrationError(f"calibration text: {error}{own}") from error


def _split(data: str) -> tuple[str, str]:
    """SET=FILE as (SET, FILE); anything else, also a path with = in it, as ("", data)."""
    known, _, file = data.partition("=")
    return (known, file) if known in HUB_DATASETS else ("", data)
