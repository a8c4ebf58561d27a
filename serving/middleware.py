"""What every HTTP request passes: an id, the API key, and one line in the log without any of its contents."""

import hmac
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .openai.answers import error_answer
from .openai.errors import ApiError

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)  # what needs no key
LEFT = 499  # the status, in logs and metrics, of a request whose client left before an answer
_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


@dataclass(frozen=True)
class Gate:
    """ASGI middleware, the outermost. `page` answers / where the key is missing: it is what asks for the key."""

    app: ASGIApp
    metrics: Metrics
    api_keys: tuple[str, ...] = ()
    page: Callable[[int], ASGIApp] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _ID.fullmatch(request_id):
            request_id = uuid4().hex
        log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(log=log, request_id=request_id)
        status, started = LEFT, time.monotonic()

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app_for(scope, headers)(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status)
            _write(scope, request_id, status, time.monotonic() - started, log)

    def _app_for(self, scope: Scope, headers: Headers) -> ASGIApp:
        if not self.api_keys or scope["path"] in OPEN_PATHS or _is_preflight(scope, headers):
            return self.app
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._knows(key.strip()):
            return self.app
        if scope["path"] == "/" and self.page is not None:
            return self.page(401)
        told = "is wrong" if key else "is missing"
        return error_answer(
            ApiError(401, f"the API key {told}; send it as Authorization: Bearer KEY.", code="invalid_api_key")
        )

    def _knows(self, key: str) -> bool:
        """In a time that tells nothing of the keys."""
        given = key.encode("latin-1")  # as it came; a key may be any UTF-8
        found = [hmac.compare_digest(given, known.encode()) for known in self.api_keys]  # all of them, always
        return any(found)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """A browser's question about another origin; it cannot carry a key, and is told nothing but what is allowed."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _write(scope: Scope, request_id: str, status: int, seconds: float, log: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": quote(scope["path"][:200]),  # as it was sent: decoded, it may hold line breaks
        "status": status,
        "seconds": round(seconds, 4),
        "request_id": request_id,
    }
    stream = log.pop("stream", None)
    if stream is not None:
        fields |= {**log, "completion_tokens": stream.completion_tokens, "finish": stream.finish_reasons()}
    level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
    logger.log(level, "request", extra={"fields": fields})


class TextFormat(logging.Formatter):
    """2026-11-23 05:30:00 INFO request method=POST path=/v1/completions ..."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class's name)
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in fields.items())])


class JsonFormat(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
