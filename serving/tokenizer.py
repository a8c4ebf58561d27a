"""The model's tokenizer as serving uses it: text and conversations to token ids, single tokens to text and bytes.

Long texts are encoded in threads beside the event loop, very long ones in threads of their own: behind four texts of
8 MB every conversation waited for 20 s. The Rust tokenizer is called directly: transformers' wrapper resets padding and
truncation with each call, which fails when two threads do it at once.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from .errors import InvalidRequestError
from .text import byte_table

T = TypeVar("T")

THREADS = 4  # the Rust tokenizer works without the interpreter's lock
THREAD_FROM = 2000  # characters; shorter texts take well under a millisecond
LARGE_THREADS = 2
LARGE_FROM = 2**18  # characters, a tenth of a second: such texts wait for each other, and nobody else for them
LARGE_MESSAGES = 1024  # of a conversation: a template takes some 20 us for each
RESERVED = {  # parameters of apply_chat_template that are no variables of a template
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """`hf` is a fast tokenizer of transformers; `chat_template` replaces its own.

    None for `hf` is a model without one: token ids in, token ids out, all texts are empty.
    """

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        self.hf = hf
        self._threads = ThreadPoolExecutor(THREADS, "tokenizer")
        self._large = ThreadPoolExecutor(LARGE_THREADS, "tokenizer-large")
        self.token_bytes = lru_cache(65536)(self._token_bytes)
        self.token_text = lru_cache(65536)(self._token_text)
        self.chat_template = chat_template
        if hf is None:
            return
        self.chat_template = chat_template or hf.chat_template
        self._rust = hf.backend_tokenizer
        self._is_byte_level = "ByteLevel" in str(self._rust.decoder)
        self._added: dict[int, str] = {int(i): token.content for i, token in hf.added_tokens_decoder.items()}
        self._longest = max((len(token) for token in hf.get_vocab()), default=1)

    async def encode(
        self, field: str, text: str, add_special_tokens: bool = True, limit: int | None = None
    ) -> list[int]:
        """Token ids of a text.

        limit  tokens that can be served: a text that is longer for certain is refused before it is encoded
        Raises InvalidRequestError for `field`.
        """
        if self.hf is None:
            raise InvalidRequestError(field, f"{field} is a text and this model has no tokenizer; send token ids.")
        if limit is not None and len(text) > (limit + 1) * self._longest:
            raise InvalidRequestError(
                field, f"{field} has {len(text)} characters, more than {limit} tokens can hold; shorten it."
            )
        if len(text) < THREAD_FROM:
            return self._encode(text, add_special_tokens)
        return await self._run(len(text) >= LARGE_FROM, lambda: self._encode_long(text, add_special_tokens))

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's chat template writes it; `variables` are for the template's own switches.

        Raises InvalidRequestError if there is no template, or it refuses the messages.
        """
        if self.chat_template is None or self.hf is None:
            raise InvalidRequestError(
                "messages",
                "messages need a chat template and this model has none; use /v1/completions, or serve with "
                "--chat-template FILE.",
            )
        wrong = sorted(RESERVED & (variables or {}).keys())
        if wrong:
            raise InvalidRequestError(
                "chat_template_kwargs",
                f"chat_template_kwargs must not have {wrong[0]!r}, which is no variable of a template; leave it out.",
            )

        def apply() -> str:
            text: str = self.hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(variables or {}),
            )
            return text

        try:
            return await self._run(len(messages) > LARGE_MESSAGES, apply)
        except Exception as error:  # a template is a program of the model's author; it fails as it likes
            reason = str(error)[:300] or type(error).__name__
            raise InvalidRequestError(
                "messages", f"the model's chat template refuses these messages: {reason}; change them."
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self.hf is None:
            return ""
        text: str = self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def close(self) -> None:
        for threads in (self._threads, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, is_large: bool, work: Callable[[], T]) -> T:
        """`work` in a thread, in its turn among those of its size."""
        return await asyncio.get_running_loop().run_in_executor(self._large if is_large else self._threads, work)

    async def decode_long(self, token_ids: Sequence[int]) -> str:
        """`decode`, while the event loop and other threads go on."""
        if self.hf is None:
            return ""
        decode = self._rust.decode_batch

        def run() -> str:
            texts: list[str] = decode([list(token_ids)], skip_special_tokens=False)
            return texts[0]

        return await self._run(len(token_ids) >= LARGE_FROM // 4, run)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """`token_text` of each."""

        def run() -> list[str]:
            return [self.token_text(token) for token in token_ids]

        return run() if len(token_ids) < THREAD_FROM else await self._run(len(token_ids) >= LARGE_FROM // 4, run)

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        """As a batch of one: `encode` keeps Python's lock all the time (1.6 s for 1.2 million characters)."""
        found: list[int] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return found

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _token_text(self, token_id: int) -> str:
        """One token alone; halves of characters are U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; nothing for an id beyond the tokenizer's."""
        if self.hf is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            table = byte_table()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
