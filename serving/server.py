"""The HTTP server: routes, the page, and a life that ends by draining.

Every route is an endpoint of openai/, which takes the service and the HTTP request; whatever it raises becomes an error
as the OpenAI API writes it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from atom import __version__

from .middleware import LEFT, Gate
from .openai import chat, completions, operations, tokenize
from .openai.answers import error_answer, internal_error
from .openai.errors import ApiError, api_error
from .openai.protocol import (
    AbortRequest,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from .openai.service import Service
from .openai.sse import ClientLeftError

logger = logging.getLogger(__name__)

Endpoint = Callable[[Service, Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Endpoint, type[Body] | None], ...] = (
    ("GET", "/v1/models", operations.models, None),
    ("GET", "/v1/models/{name:path}", operations.model, None),
    ("POST", "/v1/completions", completions.complete, CompletionRequest),
    ("POST", "/v1/chat/completions", chat.chat, ChatRequest),
    ("POST", "/v1/abort", operations.abort, AbortRequest),
    ("POST", "/tokenize", tokenize.tokenize, TokenizeRequest),
    ("POST", "/detokenize", tokenize.detokenize, DetokenizeRequest),
    ("GET", "/tokenizer_info", tokenize.tokenizer_info, None),
    ("GET", "/health", operations.health, None),
    ("GET", "/health/generate", operations.health_generate, None),
    ("GET", "/metrics", operations.metrics, None),
    ("GET", "/version", operations.version, None),
)
PAGE = files(__package__) / "page" / "index.html"
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class AppOptions:
    """Of the HTTP side.

    api_keys         any of them is let in; none: everybody
    allowed_origins  other sites whose pages may call this server from a browser
    """

    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


def build_app(service: Service, options: AppOptions | None = None) -> FastAPI:
    """The application; starting it starts the engine, stopping it stops the engine."""
    options = options or AppOptions()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.frontend.start()
        yield
        await service.close()

    app = FastAPI(title="Atom", version=__version__, lifespan=life, redoc_url=None)
    for method, path, endpoint, body in ROUTES:
        app.add_api_route(
            path,
            _guarded(service, endpoint),
            methods=[method],
            name=f"{method.lower()}_{endpoint.__name__}",
            summary=path,
            description=(body or endpoint).__doc__ or "",
            response_model=None,
            response_class=Response,
            openapi_extra=None if body is None else _body_schema(body),
        )
    app.add_api_route("/", lambda: page(200), methods=["GET"], include_in_schema=False, response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    _document_bodies(app)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Gate, metrics=service.frontend.metrics, api_keys=options.api_keys, page=page)
    return app


def page(status: int) -> Response:
    """The built-in page; it holds no data of this server, and asks for the key if one is needed."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), status, PAGE_HEADERS)


def _guarded(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(service, request)
        except (ClientLeftError, ClientDisconnect):
            return Response(status_code=LEFT)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return error_answer(api_error(error) or internal_error(error))

    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method than its own."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        answer = ApiError(405, f"{request.method} is not for {request.url.path}; use {allowed}.")
        response = error_answer(answer)
        response.headers["allow"] = allowed
        return response
    message = f"there is nothing at {request.url.path[:200]}; /docs lists what is."
    return error_answer(ApiError(error.status_code, message, code="not_found"))


def _body_schema(body: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document_bodies(app: FastAPI) -> None:
    """Add the bodies' schemas to /openapi.json: endpoints read their bodies themselves, so FastAPI knows none."""
    make = app.openapi
    bodies = [body for *_, body in ROUTES if body is not None]
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )

    def openapi() -> dict[str, Any]:
        schema = make()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
