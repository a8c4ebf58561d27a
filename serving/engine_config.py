"""What a user may say of the engine: one frozen value, from which `atom serve --help` and LLM(...) follow.

The names are vLLM's where a user would try them.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from .config import SchedulerConfig
from .rows import MOST_TOKENS

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine."""

    tokenizer: str | None = None
    """Directory or hub id of the tokenizer, if it does not lie beside the model."""

    revision: str | None = None
    """Revision of a hub model: branch, tag or commit."""

    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads the weights; dummy makes random ones, to measure speed without a checkpoint."""

    scheme: str | None = None
    """Of dummy weights: w4a8, bf16+kv4, ...; a checkpoint says its own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of everything that is not quantized; auto is float32 on a CPU and bfloat16 on a GPU."""

    kv_cache_dtype: Literal["auto", "kv4", "kv8", "kvfp8", "kv16"] = "auto"
    """Format of the KV cache; auto is what the model's scheme says."""

    kv_recent: int | None = None
    """Tokens before each query, its own among them, whose keys and values are read as they were before rounding: 16, 32
    or 64, or 0 for none; by default what the model's scheme says. Any checkpoint with a low-bit cache takes it."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""

    kernels: Literal["auto", "reference"] = "auto"
    """Run quantized ops on the kernels, or on the torch reference."""

    head: Literal["full", "int8"] = "full"
    """The head in the model's own format, or in INT8 weights and activations: half the bytes of every step."""

    max_model_len: int | None = None
    """Tokens of a sequence, prompt and output together; default: the model's context, or what the KV cache holds."""

    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, activations and KV cache together."""

    kv_cache_bytes: int | str | None = None
    """Memory of the KV cache, 4GiB say, instead of what gpu_memory_utilization leaves; 1GiB by default on a CPU."""

    block_size: int = 16
    """Tokens of a KV block."""

    max_num_seqs: int = 256
    """Sequences that run at once."""

    max_num_batched_tokens: int | None = None
    """Tokens of one step, over all sequences; longer prompts are computed in chunks. Default 8192, on a CPU 2048."""

    enable_prefix_caching: bool = True
    """Keep the KV blocks of finished sequences and reuse them for equal prefixes."""

    watermark: float = 0.01
    """Share of the KV blocks that an admission leaves free for running sequences to grow into."""

    growth_blocks: int = 2
    """KV blocks that it leaves free for each of them, where that is more."""

    admission_interval: int = 8
    """Steps from one that begins long prompts to the next, while 32 sequences or more decode and few could begin: a
    step with a prompt of more than 256 tokens is slower, several share one. 1: none waits, first tokens come up to 7
    steps sooner."""

    patience_steps: int = 256
    """Steps that one level of priority is worth."""

    max_waiting_requests: int = 1024
    """Requests that may wait for their first step; further ones are refused for now."""

    max_waiting_tokens: int = 2**21
    """Prompt tokens of those requests together."""

    num_speculative_tokens: int = 0
    """Draft tokens, looked up in the text so far, that one step checks; the output stays the same. 0: off."""

    prompt_lookup_min: int = 2
    """Tokens that must repeat for a draft."""

    prompt_lookup_max: int = 4
    """Longest run of tokens that is looked up."""

    seed: int | None = None
    """Makes the sampling of requests without a seed repeatable."""

    enforce_eager: bool = False
    """Capture no CUDA graphs: starts sooner, decodes more slowly."""

    attention_split_tokens: int | None = None
    """Attend over long sequences in parts of so many tokens, 1024 say: results then do not depend on what else is in
    the batch. By default parts are chosen for speed."""

    async_scheduling: bool = True
    """Schedule a step on the host while the GPU runs the one before."""

    watchdog_timeout: float | None = None
    """Seconds after which a step counts as stuck and the engine gives up; 0 waits for ever. Default 300; 1800 on a CPU,
    where a long prompt may take minutes."""

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        for name, hint in get_type_hints(type(self)).items():  # LLM(...) has no parser in front of it
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}; use 0.9."
            )
        if self.watchdog_timeout is not None and self.watchdog_timeout < 0:
            raise ValueError(f"watchdog_timeout must not be negative, got {self.watchdog_timeout}; 0 switches it off.")
        for name in ("max_model_len", "max_num_batched_tokens", "attention_split_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; raise it, or leave it out.")
        if self.scheme is not None and self.load_format != "dummy":
            raise ValueError(
                f"scheme={self.scheme!r} was given for a checkpoint, which says its own scheme; leave it out, "
                "quantize the model with `atom quantize`, or use load_format='dummy'."
            )
        _ = self.cache_bytes
        self.limits(vocab_size=1, max_model_len=1, num_blocks=1, is_cpu=False)  # refused before a model is loaded

    @property
    def cache_bytes(self) -> int | None:
        """kv_cache_bytes as a number."""
        return None if self.kv_cache_bytes is None else parse_bytes(self.kv_cache_bytes)

    def watchdog_s(self, is_cpu: bool) -> float | None:
        """Seconds that a step may take; None: for ever."""
        if self.watchdog_timeout is None:
            return 1800.0 if is_cpu else 300.0
        return self.watchdog_timeout or None

    def has_graphs(self, is_cpu: bool) -> bool:
        """Steps are captured; the torch reference plans its work on the host, which no graph can repeat."""
        return not is_cpu and not self.enforce_eager and self.kernels != "reference"

    def step_tokens(self, is_cpu: bool) -> int:
        """Tokens of one step at most; every running sequence can decode in it."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(2048 if is_cpu else 8192, self.max_num_seqs)

    def limits(self, vocab_size: int, max_model_len: int, num_blocks: int, is_cpu: bool) -> SchedulerConfig:
        """The scheduler's limits, once model and memory are known. ValueError if they contradict each other."""
        return SchedulerConfig(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.step_tokens(is_cpu),
            prefix_cache=self.enable_prefix_caching,
            watermark=self.watermark,
            growth_blocks=self.growth_blocks,
            admission_interval=self.admission_interval,
            admission_few=1 if self.enforce_eager or self.attention_split_tokens is not None else MOST_TOKENS,
            patience_steps=self.patience_steps,
            num_speculative_tokens=self.num_speculative_tokens,
            prompt_lookup_min=self.prompt_lookup_min,
            prompt_lookup_max=self.prompt_lookup_max,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
        )


def parse_bytes(amount: int | str) -> int:
    """Bytes of 1073741824, "4GiB", "4Gi", "25G", "500MB". ValueError for anything else, and for nothing."""
    match = _AMOUNT.fullmatch(str(amount).strip())
    size = 0 if match is None else int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size < 1:
        raise ValueError(f"{amount!r} is no amount of memory; write bytes, or a number with a unit: 4GiB, 25G, 500MB.")
    return size
