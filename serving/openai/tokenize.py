"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM answers them; with them lm-eval needs no tokenizer."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import InvalidRequestError
from .answers import JsonAnswer
from .chat import render
from .errors import ApiError
from .protocol import MAX_TOKENS, DetokenizeRequest, TokenizeRequest
from .service import Service


async def tokenize(service: Service, http: HttpRequest) -> Response:
    body = await service.read(http, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "tokenize takes either prompt or messages; send one of the two.")
    field, adds = ("prompt", True) if body.messages is None else ("messages", False)
    text = body.prompt if body.prompt is not None else await render(service, body)
    tokenizer = service.frontend.tokenizer
    ids = await tokenizer.encode(
        field, text, adds if body.add_special_tokens is None else body.add_special_tokens, MAX_TOKENS
    )
    if len(ids) > MAX_TOKENS:
        raise InvalidRequestError(field, f"{field} has {len(ids)} tokens, at most {MAX_TOKENS} are told; split it.")
    texts = await tokenizer.token_texts(ids) if body.return_token_strs else None
    return JsonAnswer({"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": texts})


async def detokenize(service: Service, http: HttpRequest) -> Response:
    body = await service.read(http, DetokenizeRequest)
    vocab_size = service.frontend.engine.config.vocab_size
    wrong = next((token for token in body.tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            "tokens", f"tokens hold {wrong}, the vocabulary ends at {vocab_size - 1}; use this model's tokenizer."
        )
    return JsonAnswer({"prompt": await service.frontend.tokenizer.decode_long(body.tokens)})


async def tokenizer_info(service: Service, http: HttpRequest) -> Response:
    hf = service.frontend.tokenizer.hf
    if hf is None:
        raise ApiError(404, "this model has no tokenizer; send token ids.", code="not_found")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: None if (token := getattr(hf, name, None)) is None else str(token) for name in names}
    return JsonAnswer({"tokenizer_class": type(hf).__name__, "model_max_length": service.max_model_len, **tokens})
