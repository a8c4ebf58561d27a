"""Workloads drawn from length distributions, and the option that names one.

512/256                     every prompt 512 tokens, every output 256
uniform:128-1024/64-256     both uniform, ends included
lognormal:33,1.28/229,0.89  median and sigma of the logarithm
paper, paper:2048           the Atom paper's: short lognormal prompts, totals uniform up to the limit
sharegpt                    lognormals fitted to the first turns of ShareGPT
trace:FILE                  a recorded trace (traces.py)
turns:FILE                  a ShareGPT trace, each turn with the conversation so far before it
"""

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .traces import read_trace
from .workload import Segment, WorkItem, Workload

PAPER_LIMIT = 2048
# Median and sigma of first turns in trace_sharegpt_lengths that vLLM's filter keeps (both sides at least 4 tokens,
# prompt at most 1024, total at most 2048): 7663 of 8683 conversations, Qwen2.5 tokens.
SHAREGPT = ((33.2, 1.28), (229.4, 0.89))
SHAREGPT_MIN, SHAREGPT_MAX_PROMPT, SHAREGPT_MAX_TOTAL = 4, 1024, 2048


class Lengths(Protocol):
    """A joint distribution of prompt and output lengths."""

    def draw(self, rng: np.random.Generator) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same lengths."""

    prompt: int
    output: int

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        return self.prompt, self.output


@dataclass(frozen=True)
class Uniform:
    """Independent, uniform over [low, high]."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        return int(rng.integers(*self.prompt, endpoint=True)), int(rng.integers(*self.output, endpoint=True))


@dataclass(frozen=True)
class LogNormal:
    """Independent, exp(N(log median, sigma)), rounded, at least 1."""

    prompt: tuple[float, float]
    output: tuple[float, float]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        return _lognormal(rng, *self.prompt), _lognormal(rng, *self.output)


@dataclass(frozen=True)
class Paper:
    """The lengths of the Atom paper's serving experiment (and Punica's, whose harness it uses).

    prompt = -1 + 18 exp(0.8 z), z standard normal (a scipy lognorm with s=0.8, loc=-1, scale=18), cut to
    [1, limit - 2]; total = uniform over [0, limit), but at least prompt + 2. The paper's own run used limit 2048.
    """

    limit: int = PAPER_LIMIT

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        prompt = int(min(max(1.0, -1.0 + 18.0 * math.exp(0.8 * rng.standard_normal())), self.limit - 2))
        total = max(prompt + 2, int(rng.integers(0, self.limit)))
        return prompt, total - prompt


@dataclass(frozen=True)
class ShareGpt:
    """Two lognormals like ShareGPT's first turns; draws outside vLLM's filter are drawn again."""

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        while True:
            prompt, output = _lognormal(rng, *SHAREGPT[0]), _lognormal(rng, *SHAREGPT[1])
            if (
                SHAREGPT_MIN <= prompt <= SHAREGPT_MAX_PROMPT
                and output >= SHAREGPT_MIN
                and prompt + output <= SHAREGPT_MAX_TOTAL
            ):
                return prompt, output


def _lognormal(rng: np.random.Generator, median: float, sigma: float) -> int:
    return max(1, round(math.exp(math.log(median) + sigma * rng.standard_normal())))


@dataclass(frozen=True)
class Drawn:
    """A workload of independent requests; no two share a prefix (but by chance)."""

    name: str
    lengths: Lengths

    @property
    def shares_prefixes(self) -> bool:
        return False

    def items(self, count: int | None, seed: int) -> list[WorkItem]:
        """`count` requests; ValueError without a count, as a distribution has no end."""
        if count is None:
            raise ValueError(f"workload {self.name} has no end; say how many requests with --num-requests")
        rng = np.random.default_rng(seed)
        drawn = [self.lengths.draw(rng) for _ in range(count)]
        return [WorkItem((Segment(f"{self.name} {i}", p),), o) for i, (p, o) in enumerate(drawn)]


_NUMBER = r"(\d+(?:\.\d+)?)"
_FIXED = re.compile(r"(\d+)/(\d+)")
_UNIFORM = re.compile(r"uniform:(\d+)-(\d+)/(\d+)-(\d+)")
_LOGNORMAL = re.compile(rf"lognormal:{_NUMBER},{_NUMBER}/{_NUMBER},{_NUMBER}")


def parse_workload(text: str) -> Workload:
    """The workload that an option names; ValueError with the known forms for any other text."""
    lengths: Lengths | None = None
    if match := _FIXED.fullmatch(text):
        lengths = Fixed(int(match[1]), int(match[2]))
        _positive(text, lengths.prompt, lengths.output)
    elif match := _UNIFORM.fullmatch(text):
        a, b, c, d = (int(g) for g in match.groups())
        _positive(text, a, c)
        if a > b or c > d:
            raise ValueError(f"workload {text!r} has a range whose end is below its start; write low-high")
        lengths = Uniform((a, b), (c, d))
    elif match := _LOGNORMAL.fullmatch(text):
        m, s, n, t = (float(g) for g in match.groups())
        _positive(text, m, n)
        lengths = LogNormal((m, s), (n, t))
    elif text == "sharegpt":
        lengths = ShareGpt()
    elif text == "paper" or re.fullmatch(r"paper:\d+", text):
        lengths = Paper(int(text.partition(":")[2] or PAPER_LIMIT))
        if lengths.limit < 4:
            raise ValueError(f"workload {text!r} leaves no room for a prompt and two tokens; use 4 or more")
    elif text.startswith(("trace:", "turns:")):
        kind, _, path = text.partition(":")
        return read_trace(path, all_turns=kind == "turns")
    if lengths is None:
        raise ValueError(
            f"cannot read workload {text!r}; the forms are PROMPT/OUTPUT, uniform:LOW-HIGH/LOW-HIGH, "
            "lognormal:MEDIAN,SIGMA/MEDIAN,SIGMA, paper[:LIMIT], sharegpt, trace:FILE, turns:FILE"
        )
    return Drawn(text, lengths)


def _positive(text: str, *lengths: float) -> None:
    if min(lengths) < 1:
        raise ValueError(f"workload {text!r} has a length below 1; prompts and outputs have at least one token")
