"""What a user may say of the HTTP side: one frozen value, from which `atom serve --help` follows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServerConfig:
    """Options of the HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, and then wants an API key."""

    port: int = 8000
    """0 takes any free port and says which."""

    api_key: tuple[str, ...] = ()
    """Every request but /health needs one of these; without, everybody is let in. Better given as ATOM_API_KEY."""

    served_model_name: tuple[str, ...] = ()
    """What clients may call the model, the first in answers; default: MODEL as it was given."""

    chat_template: Path | None = None
    """A Jinja file to use instead of the model's chat template."""

    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "none"] = "auto"
    """How the model writes tool calls; auto looks at its chat template."""

    generation_config: Literal["auto", "none"] = "auto"
    """auto samples as the model's generation_config.json wishes where a request says nothing."""

    stream_interval: int = 1
    """Tokens of a stream that are sent at once; more spare the host at hundreds of streams."""

    max_body_bytes: int = 32 * 2**20
    """Largest body of a request."""

    body_timeout: float = 60.0
    """Seconds in which a request's head must arrive, and then its body."""

    allowed_origins: tuple[str, ...] = ()
    """Other sites whose pages may call this server from a browser."""

    drain_timeout: float = 30.0
    """Seconds that running requests get after SIGTERM or Ctrl-C; a second signal ends the server at once."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """No level logs what requests and answers say."""

    log_format: Literal["text", "json"] = "text"
    """json is one object a line."""

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be within 0 and 65535, got {self.port}; 8000 is usual.")
        for name in ("stream_interval", "max_body_bytes", "body_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}; leave it out.")
        if self.drain_timeout < 0:
            raise ValueError(f"drain_timeout must not be negative, got {self.drain_timeout}; 0 aborts at once.")
        if not all(key and key == key.strip() for key in self.api_key):
            raise ValueError("api_key must not be empty or have white space around it; leave it out, or correct it.")
