"""One request as the client saw it, and the times defined on it.

All times are seconds on one monotonic clock, counted from the start of the run. In an open loop a request is due when
it arrives, whether or not the client, its connection or a limit on concurrency lets it go: TTFT and E2E count from
there, so that a server (or client) that falls behind cannot hide it (coordinated omission). In a closed loop a request
is due when its predecessor has ended.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """A request under way or done; the client fills it in.

    due_s      it should be sent
    free_s     the limit on concurrency let it go (due_s where there is none)
    sent_s     it was handed to the connection pool
    token_s    each chunk of the answer that carried tokens
    end_s      the answer was complete, or failed
    output_tokens, prompt_tokens   as the server's usage says; None if it said nothing
    is_under_way  as WorkItem.is_under_way
    is_cut     it began before what was measured (window.py): its TTFT is not known
    error      None, or its kind: connect, timeout, disconnect, malformed, "http 503", server error, empty, interrupted
    """

    index: int
    asked_prompt: int
    asked_output: int
    due_s: float
    free_s: float = 0.0
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    message: str = ""
    is_cut: bool = False
    is_under_way: bool = False

    @property
    def is_good(self) -> bool:
        return self.error is None

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, else the chunks that carried some."""
        return self.output_tokens if self.output_tokens is not None else len(self.token_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from when the request was due; None if its beginning was not measured."""
        return self.token_s[0] - self.due_s if self.token_s and not self.is_cut else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last - first) / (tokens - 1); None for fewer than two."""
        if len(self.token_s) < 2 or self.tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: gaps between chunks, which hold a token each from most servers."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """From due to the end of the answer."""
        return self.end_s - self.due_s

    @property
    def send_lag_s(self) -> float:
        """How late the client itself sent, after it was free to."""
        return self.sent_s - max(self.due_s, self.free_s)

    def to_dict(self) -> dict[str, Any]:
        """For the result file, in milliseconds where short."""
        found: dict[str, Any] = {
            "index": self.index,
            "prompt": self.asked_prompt if self.prompt_tokens is None else self.prompt_tokens,
            "output": self.tokens,
            "due_s": round(self.due_s, 6),
            "sent_s": round(self.sent_s, 6),
            "end_s": round(self.end_s, 6),
            "ttft_ms": _milliseconds(self.ttft_s),
            "tpot_ms": _milliseconds(self.tpot_s),
            "finish": self.finish_reason,
        }
        if self.error is not None:
            found |= {"error": self.error, "message": self.message[:200]}
        return found


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)
