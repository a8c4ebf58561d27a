"""Speed of light of serving: what bytes and operations allow a model, a scheme and a GPU, with perfect kernels.

A decode step reads every weight and every cached key and value once; its floor is the sum over its products and its
attention of the larger of bytes over bandwidth and operations over rate (atom.kernels.bounds, measured rates). What a
real engine adds to that (launches, norms, sampling, the host) is what a measurement next to it shows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from atom.kernels.bounds import Gpu, linear_bound_us
from atom.models.config import ModelConfig
from atom.models.footprint import measure_footprint, source_dtype
from atom.models.layout import layer_prefix
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme, Scheme

from .shapes import shape_config
from .workload import WorkItem, mean_context

PREFILL_CHUNK = 8192  # tokens of a step that prefills
GIB = 2**30


@dataclass(frozen=True, eq=False)
class Mix:
    """What a workload asks for, summed up once.

    prompts   [requests] prompt lengths
    steps     decode steps of all requests, one less than their outputs
    context   workload.mean_context
    """

    prompts: np.ndarray
    outputs: int
    steps: int
    context: float

    @classmethod
    def of(cls, items: Sequence[WorkItem]) -> "Mix":
        outputs = sum(item.output_tokens for item in items)
        prompts = np.array([item.prompt_tokens for item in items], dtype=np.float64)
        return cls(prompts, outputs, outputs - len(items), mean_context(items))


@dataclass(frozen=True)
class Bound:
    """What is possible at one batch size.

    batch      sequences that decode together
    context    tokens that each has in the cache, on average over its life
    step_ms    the decode step alone
    tpot_ms    with the share of prefill that the arrivals of a steady state put between two steps
    out_tok_s  output tokens a second, prefill included
    """

    batch: int
    context: float
    step_ms: float
    tpot_ms: float
    out_tok_s: float
    weight_bytes: int
    kv_bytes: float


class ModelFloor:
    """A model shape under a scheme on a GPU. The GPU path: 16-bit activations between ops, weights as packed."""

    def __init__(self, config: ModelConfig, scheme: Scheme, gpu: Gpu) -> None:
        self.config, self.scheme, self.gpu = config, scheme, gpu
        model = meta_model(config)
        self.footprint = measure_footprint(model, scheme, source_dtype(config), torch.bfloat16)
        self._linears = _products(model, scheme)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model in memory, embedding and head included."""
        return self.footprint.packed

    @property
    def kv_token_bytes(self) -> float:
        """Of one token in all layers."""
        return self.footprint.kv_token

    def linear_us(self, M: int, heads: int) -> float:
        """All products of one step over M tokens, of which `heads` go on through the output head."""
        layers = self._products_us(M)
        head = linear_bound_us(self.gpu, heads, self.config.vocab_size, self.config.hidden_size, LinearScheme())
        return layers + head

    def _products_us(self, M: int) -> float:
        return sum(
            count * linear_bound_us(self.gpu, M, N, K, linear) for (N, K, linear), count in self._linears.items()
        )

    def attention_us(self, queries: int, context: float) -> float:
        """Attention of one token of each of `queries` sequences over `context` cached tokens, and its append.

        Layers with a sliding window read no more than that.
        """
        config = self.config
        width = config.num_heads * config.head_dim
        kv_layer = self.kv_token_bytes / config.num_layers
        total = 0.0
        for window in config.windows:
            seen = context if window is None else min(context, window)
            moved = queries * ((seen + 1) * kv_layer + 2 * width * 2)
            operations = 4.0 * queries * width * seen
            total += 1e6 * max(moved / self.gpu.bytes_per_s, operations / self.gpu.flops_16)
        return total

    def step_us(self, batch: int, context: float) -> float:
        """One decode step of `batch` sequences of `context` tokens each."""
        return self.linear_us(batch, batch) + self.attention_us(batch, context)

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that one decode step must read: all weights but the embedding's other rows, and the cache."""
        embedding = 0 if self.config.tie_embeddings else self.config.vocab_size * self.config.hidden_size * 2
        rows = batch * self.config.hidden_size * 2
        return self.weight_bytes - embedding + rows + batch * context * self.kv_token_bytes

    @cached_property
    def _prefill_token_us(self) -> float:
        return self._products_us(PREFILL_CHUNK) / PREFILL_CHUNK

    def prefill_us(self, prompts: np.ndarray) -> float:
        """Prompts' shares of full prefill steps, summed: products in chunks, causal attention, a row of the head each.

        prompts  [requests] their lengths
        """
        config = self.config
        width = config.num_heads * config.head_dim
        pairs = sum(count * _causal_pairs(prompts, window) for window, count in Counter(config.windows).items())
        attention = 1e6 * 4.0 * width * pairs / self.gpu.flops_16
        head = 1e6 * 2.0 * config.vocab_size * config.hidden_size / self.gpu.flops_16
        return float(self._prefill_token_us * prompts.sum() + attention + head * len(prompts))

    def max_batch(self, memory_bytes: float, context: float, block_size: int = 16) -> int:
        """Sequences whose caches fit beside the weights; each wastes half a block on average. 0: not even one."""
        per_sequence = (context + (block_size - 1) / 2) * self.kv_token_bytes
        return max(0, int((memory_bytes - self.weight_bytes) / per_sequence))

    def bound(self, mix: Mix, batch: int) -> Bound:
        """The bound of a steady state in which `batch` sequences of a workload are always decoding."""
        prefill, step = self.prefill_us(mix.prompts), self.step_us(batch, mix.context)
        kv_bytes = batch * mix.context * self.kv_token_bytes
        if not mix.steps:  # outputs of one token: prefill alone
            rate = 1e6 * mix.outputs / prefill
            return Bound(batch, mix.context, step / 1e3, step / 1e3, rate, self.weight_bytes, kv_bytes)
        tpot = step + prefill / mix.steps * batch
        rate = 1e6 * mix.outputs / (mix.steps * tpot / batch)
        return Bound(batch, mix.context, step / 1e3, tpot / 1e3, rate, self.weight_bytes, kv_bytes)

    def best(self, mix: Mix, memory_bytes: float, tpot_ms: float, most: int = 4096) -> Bound | None:
        """The bound at the largest batch within the memory and the TPOT target; None if no batch is.

        A larger batch is never slower in tokens a second, so the largest is the best.
        """
        low, high = 0, min(most, self.max_batch(memory_bytes, mix.context))
        while low < high:
            middle = (low + high + 1) // 2
            if self.bound(mix, middle).tpot_ms <= tpot_ms:
                low = middle
            else:
                high = middle - 1
        return self.bound(mix, low) if low else None


def _products(model: Model, scheme: Scheme) -> Counter[tuple[int, int, LinearScheme]]:
    """(N, K, scheme) of every product of the decoder layers, counted; linears that share an input count as one."""
    found: Counter[tuple[int, int, LinearScheme]] = Counter()
    for index, layer in enumerate(model.model.decoder_layers()):
        for group in model.family.groups:
            shapes = [tuple(layer.get_parameter(f"{name}.weight").shape) for name in group.linears]
            linear = scheme.for_linear(f"{layer_prefix(index)}.{group.linears[0]}")
            found[sum(shape[0] for shape in shapes), shapes[0][1], linear] += 1
    return found


def _causal_pairs(prompts: np.ndarray, window: int | None) -> float:
    """Query and key pairs that causal prompts attend over, summed."""
    seen = prompts if window is None else np.minimum(prompts, window)
    return float((seen * (seen + 1) / 2 + (prompts - seen) * seen).sum())


@lru_cache(maxsize=64)
def model_floor(shape: str, scheme: str, gpu: Gpu) -> ModelFloor:
    """The floor of a named shape under a named scheme, made once."""
    return ModelFloor(shape_config(shape), get_scheme(scheme), gpu)
