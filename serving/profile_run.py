"""The most memory that a step takes: the largest one, run once before the KV cache takes the rest."""

import torch

from atom.models.model import Model
from atom.quant.schemes import Scheme

from .config import SchedulerConfig
from .engine_config import EngineConfig
from .kv_pool import KVPool
from .memory import Reserve, other_bytes
from .prompt_pieces import memory_bytes
from .recent import RecentRoom
from .request import Request
from .runner import Runner
from .sampler import Sampler
from .sampling_params import SamplingParams
from .scheduler import Scheduler

GRAPH_BYTES = 256 * 2**20  # that graphs may add: the decode buckets' workspaces, and what CUDA keeps


def measure_reserve(model: Model, scheme: Scheme | None, options: EngineConfig) -> Reserve:
    """What the engine needs of the GPU besides the KV cache, by running the largest step."""
    weights = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    cache_bytes = run_largest_step(model, scheme, options)
    torch.cuda.synchronize(model.device)
    step = torch.cuda.max_memory_allocated(model.device) - cache_bytes - weights
    graphs = 0 if options.enforce_eager else GRAPH_BYTES + memory_bytes(model.config)
    return Reserve(weights, step, graphs, other_bytes(model.device))


def run_largest_step(model: Model, scheme: Scheme | None, options: EngineConfig) -> int:
    """A prefill of as many tokens as a step may have, by as many sequences as may sample in it, with penalties.

    Compiles and loads what prefill needs on the way. Returns the bytes of the KV cache that it made for itself.
    """
    tokens = options.step_tokens(model.device.type == "cpu")
    seqs = min(options.max_num_seqs, tokens)
    longest = options.max_model_len or model.config.max_position_embeddings
    lengths = [min(max(1, longest - 1), tokens // seqs + (index < tokens % seqs)) for index in range(seqs)]
    size = options.block_size
    num_blocks = sum(-(-length // size) for length in lengths)
    limits = SchedulerConfig(
        vocab_size=model.config.vocab_size,
        max_model_len=model.config.max_position_embeddings,
        num_blocks=num_blocks,
        block_size=size,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        watermark=0.0,
        growth_blocks=0,
        max_waiting_requests=seqs,
        max_waiting_tokens=tokens,
        prefix_cache=False,
    )
    pool = KVPool(model.config, scheme, num_blocks, size, model.dtype, model.device, RecentRoom(seqs, tokens))
    sampler = Sampler(seqs, model.config.vocab_size, model.device, 0, options.kernels)
    runner = Runner(model, pool, sampler, seqs, kernels=options.kernels)
    scheduler = Scheduler(limits)
    params = SamplingParams(max_tokens=1, top_p=0.9, presence_penalty=0.5)
    for index, length in enumerate(lengths):
        scheduler.add(Request(f"profile-{index}", (0,) * length, params))
    step = scheduler.schedule()
    assert step is not None
    runner.launch(step).result()
    return pool.num_bytes
