"""What the scheduler can be asked about itself; the source of the engine's metrics."""

from typing import NamedTuple


class Stats(NamedTuple):  # taken several times a step
    """Gauges of this moment, and counters since the start (`num_...`)."""

    waiting: int  # sequences, preempted ones included
    waiting_new: int  # those of them that never ran
    waiting_tokens: int  # prompt tokens of those that never ran
    running: int  # sequences
    in_flight: int  # steps
    blocks: int
    used_blocks: int
    cached_blocks: int  # free, with a known prefix
    num_steps: int
    num_preemptions: int
    num_evictions: int  # of cached blocks
    num_prefix_queries: int  # tokens that were looked up in the prefix cache
    num_prefix_hits: int  # tokens that were found there, or shared with another sample
    num_finished: int  # sequences, for any reason
    num_prompt_tokens: int  # of admitted sequences, cached ones included
    num_output_tokens: int  # that were handed out
    num_draft_tokens: int  # guessed by speculative decoding
    num_accepted_tokens: int  # those of them that were right
    num_failures: int = 0  # failed steps
