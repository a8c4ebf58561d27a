"""Measure a model: perplexity on texts, tasks through lm-eval, on the execution path that runs it.

Example: atom eval smollm2-w4a4 --ppl wikitext2 --tasks piqa,arc_easy --limit 100 --output result.json
"""

from typing import Any

from atom.eval.run import EvalConfig as Options
from atom.eval.run import evaluate

from .console import console, progress_console

__all__ = ["Options", "run"]


def run(options: Options) -> dict[str, Any]:
    """Print the results' table; returns the numbers alone."""
    with progress_console.status("loading") as status:

        def show(text: str, done: int, count: int, perplexity: float) -> None:
            status.update(f"{text}: window {done} of {count}, perplexity {perplexity:.4f}")

        result = evaluate(options, progress=show)
    console.print(result.table())
    summary: dict[str, Any] = result.summary()
    return summary
