"""Rows of any length for a producer kernel that reads them in whole chunks. Slow, and made for odd models only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .producer_config import CHUNK, ProducerConfig


@dataclass(frozen=True)
class FilledRows:
    """A compiled kernel whose inputs are filled up on the way; called like the kernel itself."""

    kernel: Any
    config: ProducerConfig

    def __call__(self, x: Tensor, other: Any, total: Any, *rest: Any) -> None:
        config = self.config
        x = filled_rows(x, config)
        if config.reads_two:
            other = filled_rows(other, config)
        if config.source != "add_norm":
            self.kernel(x, other, total, *rest)
            return
        filled = torch.empty_like(x)
        self.kernel(x, other, filled, *rest)
        at, missing = place_of_filling(config)
        total.copy_(torch.cat((filled[:, :at], filled[:, at + missing :]), 1))


def filled_rows(x: Tensor, config: ProducerConfig) -> Tensor:
    """x [T, K] -> [T, K rounded up to whole chunks], as the kernel of `config` reads it: columns of zeros put in."""
    at, missing = place_of_filling(config)
    return torch.cat((x[:, :at], x.new_zeros(x.shape[0], missing), x[:, at:]), 1)


def place_of_filling(config: ProducerConfig) -> tuple[int, int]:
    """(the column before which zeros are put in, how many).

    At the end; where nothing is permuted behind the normal columns, so that outliers begin a chunk.
    """
    return config.columns - (0 if config.permuted else config.outliers), -config.columns % CHUNK
