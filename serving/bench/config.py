"""The options of `atom bench serve`, as one frozen value."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .answer import Endpoint
from .arrivals import Arrivals
from .lengths import parse_workload
from .slo import Slo
from .target import PromptFormat, normalize_url


@dataclass(frozen=True)
class ServeBenchConfig:
    """Load an OpenAI-compatible server and measure what its clients see.

    Example: atom bench serve --url http://localhost:8000 --workload 512/256 --max-concurrency 32 --num-requests 256
    """

    url: str = "http://localhost:8000"
    """The server: Atom, vLLM, SGLang, or another that speaks the API. A key is read from OPENAI_API_KEY."""

    workload: str = "512/256"
    """PROMPT/OUTPUT tokens, uniform:LOW-HIGH/LOW-HIGH, lognormal:MEDIAN,SIGMA/MEDIAN,SIGMA, paper, sharegpt,
    trace:FILE, or turns:FILE."""

    num_requests: int | None = None
    """How many requests; default: all of a trace, else 4 for each one under way, at least 64."""

    max_concurrency: int | None = None
    """Requests under way at once. Without a rate this is a closed loop; default there: 16."""

    request_rate: float = math.inf
    """Requests a second (an open loop, which waits for nobody); inf is a closed loop."""

    burstiness: float = 1.0
    """Shape of the gaps' gamma distribution: 1 is a Poisson process, less is burstier."""

    trace_arrivals: bool = False
    """Send when the trace says."""

    speed: float = 1.0
    """Factor on the trace's clock."""

    duration: float | None = None
    """Send nothing new after so many seconds."""

    warmup: int | None = None
    """Requests that are sent first and not counted; default: as many as run at once, at most 8."""

    endpoint: Endpoint = "completions"
    """completions or chat."""

    prompt_format: Literal["auto", "ids", "text"] = "auto"
    """Token ids, or text that encodes to as many; auto is ids for completions and text for chat."""

    model: str | None = None
    """As the server calls it; default: the one that it serves."""

    tokenizer: str | None = None
    """Directory or hub id, for prompts; default: the served model's, if it is a directory here."""

    token_ids: str | None = None
    """LOW:HIGH, the ids to draw prompts from where no tokenizer is at hand."""

    slo: str | None = None
    """Limits for goodput in milliseconds: ttft:500,tpot:50 (and e2e)."""

    temperature: float = 0.0
    """0 is greedy."""

    ignore_eos: bool = True
    """Ask for exactly the workload's tokens; a server without this extension needs --no-ignore-eos."""

    extra_body: str = "{}"
    """JSON object whose fields go into every request."""

    ppl: Path | None = None
    """Also the perplexity of this text file, through the server (prompt_logprobs), after the load."""

    ppl_window: int = 512
    """Tokens of a window of it, as for atom eval."""

    ppl_windows: int = 64
    """Windows at most."""

    max_model_len: int | None = None
    """Longer requests are left out, and counted; default: what the server says of its model."""

    timeout: float = 600.0
    """Seconds for one request, then it is an error."""

    seed: int = 0
    """Of lengths, arrivals and prompts."""

    label: str | None = None
    """What reports call this server; default: the model as it calls it. Runs of one label are one curve."""

    output: Path | None = None
    """Write the full result, one entry for each request, as JSON."""

    def __post_init__(self) -> None:
        normalize_url(self.url)
        if not self.workload.startswith(("trace:", "turns:")):  # a file is opened when the run starts
            parse_workload(self.workload)
        _ = self.arrivals
        if self.slo is not None:
            Slo.parse(self.slo)
        for name in ("num_requests", "warmup"):
            value, low = getattr(self, name), int(name == "num_requests")
            if value is not None and value < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}; leave it out")
        if self.ppl_window < 2 or self.ppl_windows < 1:
            raise ValueError("--ppl-window is at least 2 tokens and --ppl-windows at least 1")
        if self.ppl is not None and self.token_ids is not None:
            raise ValueError("--ppl needs the tokenizer; give --tokenizer instead of --token-ids")
        for name in ("timeout", "duration"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name} is in seconds and above 0, got {value}; leave it out")
        if self.token_ids is not None and not re.fullmatch(r"\d+:\d+", self.token_ids):
            raise ValueError(f"--token-ids is a range LOW:HIGH, 100:30000 say, got {self.token_ids!r}")
        if self.token_ids is not None and self.chosen_format == "text":
            raise ValueError("prompts as text need a tokenizer, a range of ids is not enough; give --tokenizer")
        if self.endpoint == "chat" and self.prompt_format == "ids":
            raise ValueError("a chat's messages are text; use --prompt-format text, or --endpoint completions")
        try:
            is_object = isinstance(json.loads(self.extra_body), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"--extra-body must be a JSON object, got {self.extra_body!r}; quote it for the shell")

    @property
    def arrivals(self) -> Arrivals:
        is_closed = math.isinf(self.request_rate) and not self.trace_arrivals
        limit = self.max_concurrency if self.max_concurrency is not None or not is_closed else 16
        return Arrivals(self.request_rate, self.burstiness, limit, self.trace_arrivals, self.speed)

    @property
    def chosen_format(self) -> PromptFormat:
        if self.prompt_format != "auto":
            return self.prompt_format
        return "text" if self.endpoint == "chat" else "ids"

    @property
    def wanted_requests(self) -> int | None:
        """None: all of a trace."""
        if self.num_requests is not None or self.workload.startswith(("trace:", "turns:")):
            return self.num_requests
        return max(64, 4 * (self.arrivals.max_concurrency or 0))

    @property
    def wanted_warmup(self) -> int:
        return min(self.arrivals.max_concurrency or 8, 8) if self.warmup is None else self.warmup
