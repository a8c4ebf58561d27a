"""The scheduler's limits, as one frozen value."""

from dataclasses import dataclass, fields

MAX_PRIORITY = 100


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the engine; the first four follow from the model and the memory, the rest have defaults.

    Raises ValueError for limits that contradict each other.
    """

    vocab_size: int
    """Token ids of a request lie below it."""
    max_model_len: int
    """Tokens of a sequence, prompt and output together."""
    num_blocks: int
    """KV blocks of the cache."""
    block_size: int = 16
    """Tokens of a KV block."""
    max_num_seqs: int = 256
    """Sequences that run at once."""
    max_num_batched_tokens: int = 8192
    """Tokens of one step, over all sequences; a longer prompt is computed in chunks."""
    prefix_cache: bool = True
    """Keep the blocks of finished sequences and reuse them for equal prefixes."""
    forks: bool = True
    """Samples of one request share the blocks of their prompt."""
    watermark: float = 0.01
    """Share of the blocks that stays free when a sequence is admitted beside others, for those to grow into."""
    growth_blocks: int = 2
    """Blocks that stay free then for each of the others, where that is more."""
    admission_interval: int = 1
    """Steps from one that begins prompts to the next while a crowd decodes, so that several prompts share one."""
    admission_crowd: int = 32
    """Decoding sequences that are a crowd."""
    admission_few: int = 1
    """Prompt tokens that may begin in any step all the same: whole prompts, so short that they cost it little."""
    patience_steps: int = 256
    """Steps that one level of priority is worth: a request never waits for later ones beyond this."""
    num_speculative_tokens: int = 0
    """Draft tokens of a greedy sequence that one step checks at most; 0: no speculative decoding."""
    prompt_lookup_min: int = 2
    """Tokens that must repeat for a draft."""
    prompt_lookup_max: int = 4
    """Longest run of tokens that is looked up."""
    max_waiting_requests: int = 1024
    """Requests that may wait for their first step; further ones are refused for now."""
    max_waiting_tokens: int = 2**21
    """Prompt tokens of those requests together; one request alone may always wait."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("num_speculative_tokens", "growth_blocks") else 1
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name} must be an integer of at least {least}, got {value!r}; raise it.")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be at least 0 and below 1, got {self.watermark}; use 0.01.")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min must be at most prompt_lookup_max = {self.prompt_lookup_max}, got "
                f"{self.prompt_lookup_min}; lower it."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs = {self.max_num_seqs}, so that every running "
                f"sequence can decode in every step, got {self.max_num_batched_tokens}; raise it or lower max_num_seqs."
            )

    @property
    def cache_tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence, in tokens: the last one is sampled and never stored."""
        return min(self.max_model_len, self.cache_tokens + 1)

    @property
    def watermark_blocks(self) -> int:
        return int(self.num_blocks * self.watermark)

    def reserve_blocks(self, running: int) -> int:
        """Blocks that stay free when a sequence is admitted beside `running` others; alone it may have all."""
        return max(self.watermark_blocks, self.growth_blocks * running) if running else 0
