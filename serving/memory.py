"""How many KV blocks there are: from kv_cache_bytes, or from what the GPU has left when the model has run once."""

from dataclasses import dataclass

import torch

from atom.errors import UnsupportedError
from atom.models.config import ModelConfig
from atom.quant.schemes import Scheme

from .engine_config import EngineConfig
from .kv_pool import bytes_per_block
from .recent import RecentRoom
from .rows import MOST_TOKENS

CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class CachePlan:
    """The KV cache that will be made.

    num_blocks     that sequences may own
    max_model_len  tokens of a sequence, prompt and output together
    is_shortened   the model's context is longer than that: the cache cannot hold one such sequence
    recent_bytes   of the exact tokens beside the blocks, where the scheme has a recent window
    """

    num_blocks: int
    block_bytes: int
    max_model_len: int
    is_shortened: bool
    recent_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes + self.recent_bytes


@dataclass(frozen=True)
class Reserve:
    """Bytes of a GPU that the KV cache does not get.

    weights  the model, and what else torch holds before a step
    step     most that torch allocates on top during the largest step
    graphs   kept free for what decode buckets and pieces of steps with prompts add when they are captured
    others   CUDA itself, kernels, and whatever else runs on the device
    """

    weights: int
    step: int
    graphs: int
    others: int

    @property
    def total(self) -> int:
        return self.weights + self.step + self.graphs + self.others


def plan_cache(
    model: ModelConfig, scheme: Scheme | None, dtype: torch.dtype, options: EngineConfig, available: int,
    is_cpu: bool = False,
) -> CachePlan:  # fmt: skip
    """The cache in `available` bytes. Exact tokens have their room for all sequences; blocks get the rest.

    Raises UnsupportedError if those hold no block, and ValueError if max_model_len was asked for and is longer than the
    model's context or the cache.
    """
    block_bytes = bytes_per_block(model, scheme, dtype, options.block_size)
    recent = 0 if scheme is None else scheme.kv_recent
    room = recent_room(options.max_num_seqs, options.step_tokens(is_cpu), options, is_cpu)
    recent_bytes = room.num_bytes(model, recent, dtype) if recent else 0
    num_blocks = max(0, available - recent_bytes) // block_bytes
    if num_blocks < 1:
        beside = f" beside {_amount(recent_bytes)} of exact tokens of {options.max_num_seqs} sequences"
        raise UnsupportedError(
            f"{_amount(available)} are left for the KV cache and one block of {options.block_size} tokens takes "
            f"{_amount(block_bytes)}{beside if recent else ''}; raise gpu_memory_utilization or kv_cache_bytes, "
            f"{'lower max_num_seqs, ' if recent else ''}or use a smaller model or cache format."
        )
    held = num_blocks * options.block_size + 1  # the last token of a sequence is never stored
    wanted = options.max_model_len
    if wanted is not None and wanted > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len {wanted} was asked for and the model's context has {model.max_position_embeddings} tokens; "
            "lower max_model_len or leave it out."
        )
    if wanted is not None and wanted > held:
        raise ValueError(
            f"max_model_len {wanted} was asked for and the KV cache of {_amount(available)} holds {held - 1} tokens; "
            "lower max_model_len, raise gpu_memory_utilization or kv_cache_bytes, or use a smaller cache format."
        )
    longest = model.max_position_embeddings if wanted is None else wanted
    return CachePlan(num_blocks, block_bytes, min(longest, held), longest > held, recent_bytes)


def recent_room(lanes: int, step_tokens: int, options: EngineConfig, is_cpu: bool) -> RecentRoom:
    """The room for exact tokens, should the scheme keep some."""
    has_rows = options.has_graphs(is_cpu) and options.attention_split_tokens is None
    return RecentRoom(lanes, step_tokens, options.num_speculative_tokens, MOST_TOKENS if has_rows else 0)


def gpu_cache_bytes(device: torch.device, utilization: float, reserve: Reserve) -> int:
    """What is left for the cache of `utilization` of the GPU's memory."""
    _, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - reserve.total


def other_bytes(device: torch.device) -> int:
    """What is in use on the GPU beside torch's own memory."""
    torch.cuda.empty_cache()
    return used_bytes(device) - torch.cuda.memory_reserved(device)


def used_bytes(device: torch.device) -> int:
    """Bytes of a GPU that anything uses, this process or another; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
