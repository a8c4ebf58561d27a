"""Talk to a model in the terminal, or answer one --prompt. /reset forgets the conversation, Ctrl-C ends an answer.

Example: atom chat smollm2-w4a4 --prompt "What is the capital of France?"        atom chat http://127.0.0.1:8000
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import tyro

from ..errors import UnsupportedError
from .console import console


@dataclass(frozen=True)
class Options:
    """Options of `atom chat`."""

    model: Annotated[str, tyro.conf.Positional]
    """Atom checkpoint, model directory, hub id, GGUF file, the alias smollm2, or the URL of a server."""

    prompt: str | None = None
    """Answer this and stop; without it, a conversation starts."""

    max_new_tokens: int = 200
    """Tokens of one answer at most."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""

    seed: int = 0
    """Of the sampling."""

    raw: bool = False
    """Continue the text as it stands instead of using the chat template."""

    device: str = "auto"
    """cpu, cuda, or auto; a server has its own."""

    kernels: Literal["auto", "reference"] = "auto"
    """Run quantized ops on the kernels, or on the torch reference; a server has its own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}; leave it out for 200")
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, got {self.temperature}; use 0 for greedy")

    @property
    def is_url(self) -> bool:
        return self.model.startswith(("http://", "https://"))


class Speaker(Protocol):
    """What answers: a model of this process, or a server. `prompt_tokens` and `tokens` are the last answer's."""

    prompt_tokens: int
    tokens: int

    def answer(self, prompt: list[dict[str, str]] | str, options: Options) -> Iterator[str]: ...


def run(options: Options) -> dict[str, Any]:
    """Answer the prompt, or hold a conversation until end of input."""
    speaker: Speaker = _Served(options) if options.is_url else _Loaded(options)
    messages: list[dict[str, str]] = []
    answers: list[dict[str, Any]] = []
    for prompt in [options.prompt] if options.prompt is not None else _lines():
        if prompt.strip() == "/reset":
            messages.clear()
            console.print("[dim]the conversation starts anew[/dim]")
            continue
        messages.append({"role": "user", "content": prompt})
        answer = _say(speaker, messages if not options.raw else prompt, options)
        messages.append({"role": "assistant", "content": answer["text"]})
        answers.append({"prompt": prompt, **answer})
    return {"model": options.model, "answers": answers}


def _lines() -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold]you:[/bold] ")
        except EOFError:
            return
        if line.strip():
            yield line


def _say(speaker: Speaker, prompt: list[dict[str, str]] | str, options: Options) -> dict[str, Any]:
    """Print an answer while it comes; Ctrl-C ends it, and what was said stays in the conversation."""
    start, first, text, is_cut = time.perf_counter(), None, "", False
    pieces = speaker.answer(prompt, options)
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if options.prompt is not None:
            raise
        is_cut = True
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator's: ends the request in a server
    print(" ..." if is_cut else "")
    seconds = time.perf_counter() - start
    ttft = (first or time.perf_counter()) - start
    tokens = speaker.tokens
    return {
        "text": text,
        "prompt_tokens": speaker.prompt_tokens,
        "tokens": tokens,
        "ttft_s": round(ttft, 3),
        "tokens_per_s": round((tokens - 1) / (seconds - ttft), 2) if tokens > 1 and seconds > ttft else None,
    }


class _Served:
    def __init__(self, options: Options) -> None:
        try:
            from .chat_remote import Remote
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"talking to a server needs the package {error.name}; pip install 'atom-serving[serving]'"
            ) from None
        self.remote = Remote(options.model)
        self.prompt_tokens = self.tokens = 0

    def answer(self, prompt: list[dict[str, str]] | str, options: Options) -> Iterator[str]:
        self.remote.usage = {}
        yield from self.remote.answer(
            prompt, max_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed
        )
        self.prompt_tokens = self.remote.usage.get("prompt_tokens", 0)
        self.tokens = self.remote.usage.get("completion_tokens", 0)


class _Loaded:
    def __init__(self, options: Options) -> None:
        from atom.eval.load import load

        self.loaded = load(options.model, options.device, kernels=options.kernels)
        self.prompt_tokens = self.tokens = 0

    def answer(self, prompt: list[dict[str, str]] | str, options: Options) -> Iterator[str]:
        from atom.models.generate import generate

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if isinstance(prompt, str) or tokenizer.chat_template is None:
            ids = tokenizer.encode(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        self.prompt_tokens, self.tokens = len(ids), 0
        stops, out, shown = set(model.config.eos_token_ids), list[int](), ""
        limit, temperature, seed = options.max_new_tokens, options.temperature, options.seed
        for token in generate(model, ids, limit, eos=stops, temperature=temperature, seed=seed):
            if token in stops:
                break
            out.append(token)
            self.tokens = len(out)
            text = tokenizer.decode(out, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: wait for the rest
                yield text[len(shown) :]
                shown = text
