"""The server's side of `atom chat URL`: one streamed answer over the OpenAI API."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from ..env import api_keys
from ..errors import AtomError


class ServerError(AtomError):
    """The server cannot be reached, or refuses."""


class Remote:
    """A served model. Raises ServerError if nothing serves at `url`."""

    def __init__(self, url: str) -> None:
        keys = api_keys()
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self.http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=600))
        self.usage: dict[str, Any] = {}
        try:
            answer = self.http.get("/v1/models")
            self._check(answer)
            self.model: str = answer.json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"nothing answers at {url} ({error}); start it with atom serve, or check the URL."
            ) from None
        except (ValueError, LookupError, TypeError):
            raise ServerError(f"what answers at {url} is no OpenAI API; check the URL.") from None

    def answer(self, prompt: list[dict[str, str]] | str, **params: Any) -> Iterator[str]:
        """Pieces of the answer to a conversation, or of what follows a text; `usage` is set at the end.

        Leaving the loop closes the connection, which ends the request in the server.
        """
        path, field = ("/v1/completions", "prompt") if isinstance(prompt, str) else ("/v1/chat/completions", "messages")
        body = {"model": self.model, field: prompt, "stream": True, "stream_options": {"include_usage": True}, **params}
        try:
            with self.http.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                self._check(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield self._read(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise ServerError(f"the server's answer broke off ({error or type(error).__name__}); ask again.") from None

    def _read(self, event: dict[str, Any]) -> str:
        if "error" in event:
            raise ServerError(f"the server failed: {event['error']['message']}")
        self.usage = event.get("usage") or self.usage
        if not event["choices"]:
            return ""
        choice = event["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        return text or ""

    @staticmethod
    def _check(answer: httpx.Response) -> None:
        if answer.status_code == 401:
            raise ServerError("the server asks for an API key, or knows yours not; set ATOM_API_KEY.")
        if answer.status_code != 200:
            try:
                message = answer.json()["error"]["message"]
            except (ValueError, LookupError, TypeError):
                message = answer.text[:200]
            raise ServerError(f"the server refuses ({answer.status_code}): {message}")
