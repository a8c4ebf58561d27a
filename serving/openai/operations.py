"""What operators and clients ask about the server itself: models, health, metrics, version, and aborts."""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from atom import __version__

from ..frontend import new_id
from ..request import Request
from ..sampling_params import SamplingParams
from .answers import JsonAnswer
from .errors import ApiError
from .protocol import AbortRequest
from .service import Service

GENERATE_TIMEOUT_S = 30.0


async def models(service: Service, http: HttpRequest) -> Response:
    return JsonAnswer({"object": "list", "data": [_card(service, name) for name in service.names]})


async def model(service: Service, http: HttpRequest) -> Response:
    name = http.path_params["name"]
    if name not in service.names:
        raise ApiError(404, f"model {name[:200]!r} does not exist here.", "model", code="model_not_found")
    return JsonAnswer(_card(service, name))


def _card(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "atom",
        "root": service.root or name,
        "max_model_len": service.max_model_len,
    }


async def health(service: Service, http: HttpRequest) -> Response:
    """200 while requests are taken."""
    frontend = service.frontend
    if frontend.is_draining:
        return JsonAnswer({"status": "draining"}, 503, {"retry-after": "5"})
    if not frontend.engine.healthy:
        return JsonAnswer({"status": "dead", "reason": frontend.engine.error}, 503)
    return JsonAnswer({"status": "ok"})


async def health_generate(service: Service, http: HttpRequest) -> Response:
    """200 if the engine makes a token, ahead of what waits."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request(new_id("health"), (0,), params, priority=-100)
    stream = service.frontend.open([request])
    try:
        async with asyncio.timeout(GENERATE_TIMEOUT_S):
            async for chunk in stream:
                if chunk.token_ids:
                    return JsonAnswer({"status": "ok"})
    except TimeoutError:
        pass
    finally:
        stream.close()
    raise ApiError(503, f"no token came within {GENERATE_TIMEOUT_S:g} s.", code="no_token", retry_after_s=5)


async def version(service: Service, http: HttpRequest) -> Response:
    return JsonAnswer({"version": __version__})


async def metrics(service: Service, http: HttpRequest) -> Response:
    found = service.frontend.metrics
    return Response(found.render(), headers={"content-type": found.content_type})


async def abort(service: Service, http: HttpRequest) -> Response:
    """By the id of an answer, which ends all its prompts' requests."""
    body = await service.read(http, AbortRequest)
    return JsonAnswer({"request_id": body.request_id, "aborted": service.frontend.abort(body.request_id)})
