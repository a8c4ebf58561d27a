"""Talk to a model in the terminal, or answer one --prompt.

Example: atom chat smollm2-w4a4 --prompt "What is the capital of France?"
"""

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from .console import console


@dataclass(frozen=True)
class Options:
    """Options of `atom chat`."""

    model: Annotated[str, tyro.conf.Positional]
    """Atom checkpoint, model directory, hub id, GGUF file, or the alias smollm2."""

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
    """cpu, cuda, or auto."""

    kernels: Literal["auto", "reference"] = "auto"
    """Run quantized ops on the kernels, or on the torch reference."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}; leave it out for 200")
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, got {self.temperature}; use 0 for greedy")


def run(options: Options) -> dict[str, Any]:
    """Answer the prompt, or hold a conversation until end of input."""
    from atom.eval.load import load

    loaded = load(options.model, options.device, kernels=options.kernels)
    messages: list[dict[str, str]] = []
    answers: list[dict[str, Any]] = []
    for prompt in [options.prompt] if options.prompt is not None else _lines():
        messages.append({"role": "user", "content": prompt})
        answer = _answer(loaded.model, loaded.tokenizer, messages if not options.raw else prompt, options)
        messages.append({"role": "assistant", "content": answer["text"]})
        answers.append({"prompt": prompt, **answer})
    return {"model": options.model, "answers": answers}


def _lines() -> Any:
    while True:
        try:
            line = console.input("[bold]you:[/bold] ")
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]] | str, options: Options) -> dict[str, Any]:
    from atom.models.generate import generate

    if isinstance(prompt, str) or tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        ids = tokenizer.encode(text)
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    stops = set(model.config.eos_token_ids)
    start, first, out, shown = time.perf_counter(), None, [], ""
    for token in generate(
        model, ids, options.max_new_tokens, eos=stops, temperature=options.temperature, seed=options.seed
    ):
        first = first or time.perf_counter()
        if token in stops:
            break
        out.append(token)
        text = tokenizer.decode(out, skip_special_tokens=True)
        if not text.endswith("�"):  # half of a character: wait for the rest
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print()
    seconds = time.perf_counter() - start
    ttft = (first or time.perf_counter()) - start
    return {
        "text": shown,
        "prompt_tokens": len(ids),
        "tokens": len(out),
        "ttft_s": round(ttft, 3),
        "tokens_per_s": round((len(out) - 1) / (seconds - ttft), 2) if len(out) > 1 and seconds > ttft else None,
    }
