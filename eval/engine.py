"""Generation for tasks on the engine that serves: continuous batches and the paged cache."""

from collections.abc import Sequence
from typing import Any

from atom.closing import Closes
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams

from .generate import Sampling

CACHE_BYTES = "4GiB"  # of its paged cache, unless told otherwise: the model that scores stands beside it


class EngineGenerator(Closes):
    """Continues prompts on an engine of its own. Close it, or use it as a context manager.

    model    Atom checkpoint, directory, GGUF file, hub id or alias
    options  fields of EngineConfig
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.llm = LLM(model, **{"kv_cache_bytes": CACHE_BYTES, **options})

    def close(self) -> None:
        """Stop the engine; may be called again."""
        self.llm.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[list[int]]:
        """Continue each prompt until one of the strings `stop`, EOS or `max_new_tokens`; returns the new tokens."""
        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=tuple(stop),
        )
        return [list(completion.token_ids) for completion in self.llm.generate([list(p) for p in prompts], params)]
