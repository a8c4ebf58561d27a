"""The options of `atom bench throughput` and `atom bench latency`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from atom.models.dummy import SHAPES
from atom.quant.presets import get_scheme

from ..engine_config import EngineConfig
from .lengths import parse_workload
from .window import STEADY, WINDOW_S


@dataclass(frozen=True)
class ModelChoice:
    """What runs, and in how much memory."""

    model: Annotated[str, tyro.conf.Positional]
    """A model to load; or llama-2-7b, llama-2-13b, llama-3-8b, llama-3-70b or tiny: a shape with random weights."""

    memory_gb: float | None = None
    """GiB for weights, KV cache and working memory together; default: what gpu_memory_utilization allows."""

    engine: Annotated[EngineConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.memory_gb is not None:
            if self.memory_gb <= 0:
                raise ValueError(f"--memory-gb must be above 0, got {self.memory_gb}; leave it out for all there is")
            if self.engine.kv_cache_bytes is not None:
                raise ValueError("--memory-gb leaves the KV cache what the weights do not take; drop --kv-cache-bytes")
        if self.engine.scheme is not None:
            get_scheme(self.engine.scheme)

    @property
    def seed(self) -> int:
        """Of lengths and prompts: the engine's, or 0."""
        return self.engine.seed or 0

    @property
    def is_dummy(self) -> bool:
        """Random weights: speed is real, text and quality are not."""
        return self.engine.load_format == "dummy" or self.model in SHAPES

    @property
    def engine_options(self) -> EngineConfig:
        """The engine's options; a shape's name implies dummy weights."""
        return replace(self.engine, load_format="dummy") if self.is_dummy else self.engine


@dataclass(frozen=True)
class ThroughputConfig(ModelChoice):
    """Tokens a second of the engine in process, without HTTP.

    Example: atom bench throughput llama-3-8b --load-format dummy --scheme w4a8 --workload 512/256 --num-requests 512
    """

    workload: tuple[str, ...] = ("512/256",)
    """Lengths, as for atom bench serve; all of them on one engine, one after the other. steady:512/256 measures a
    window of a full batch, from requests of every age, instead of all requests to their ends."""

    window_s: float = WINDOW_S
    """Seconds of such a window."""

    num_requests: int | None = None
    """How many; default: all of a trace, else 4 for each one under way, at least 64 (512 if all come at once)."""

    concurrency: tuple[int, ...] = (0,)
    """Requests under way at once, a run for each; 0: all at once, and the engine chooses."""

    rate: tuple[float, ...] = ()
    """Instead: Poisson arrivals of so many requests a second, a run for each."""

    points: Path | None = None
    """Append each run's numbers to this file, a line of JSON each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for workload in self.workload:
            if not workload.removeprefix(STEADY).startswith(("trace:", "turns:")):
                parse_workload(workload.removeprefix(STEADY))
        if not self.workload:
            raise ValueError("--workload names no lengths; 512/256 is the default")
        if self.window_s <= 0:
            raise ValueError(f"--window-s must be above 0, got {self.window_s}; leave it out for {WINDOW_S:g}")
        if self.rate and any(workload.startswith(STEADY) for workload in self.workload):
            raise ValueError("a steady: workload is a closed loop; drop --rate, or steady:")
        if any(c < 0 for c in self.concurrency) or any(r <= 0 for r in self.rate):
            raise ValueError("--concurrency is at least 0 and --rate above 0; 0 under way means all at once")

    def requests_at(self, workload: str, concurrency: int) -> int | None:
        """None: all of a trace."""
        if self.num_requests is not None or workload.startswith(("trace:", "turns:")):
            return self.num_requests
        return max(64, 4 * concurrency) if concurrency else 512


@dataclass(frozen=True)
class LatencyConfig(ModelChoice):
    """Milliseconds of a decode step of a batch that does not change, and of its prefill.

    Example: atom bench latency llama-3-8b --load-format dummy --scheme w4a8 --batch 1 16 64 --context 1024
    """

    batch: tuple[int, ...] = (1,)
    """Sequences that decode together."""

    context: tuple[int, ...] = (1024,)
    """Tokens of each before the first measured step."""

    steps: int = 32
    """Decode steps to measure."""

    rows: Path | None = None
    """Append the rows of record `latency` to this file, a line of JSON each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(*self.batch, *self.context, self.steps) < 1 or self.steps < 2:
            raise ValueError("--batch and --context are at least 1, --steps at least 2")
