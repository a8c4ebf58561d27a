"""Logits to tokens, on the device and without waiting for it.

The order is vLLM's: mask of a grammar, logit bias and forbidden stop tokens, penalties, temperature, min-p, top-k,
top-p, draw. Log-probabilities are of the logits as the model gave them (see logprobs.py).

A draw goes in two stages, so that noise is needed for few candidates instead of the whole vocabulary: first one of its
tiles of 512 tokens by their mass, then a token of that tile, both as the argmax of log-probability plus Gumbel noise.
That is exact, and rounding moves it only where two candidates nearly tie.

On a GPU a step whose rows choose by their logits as they are (bfloat16; no penalty, bias or mask) is one kernel
(atom/kernels/greedy.py, draw.py). The code below defines what these do and runs everything else; there, top-p without a
top-k, or a top-k above 1024, sorts whole rows, 32 at a time. Costs stand in docs/serving.md.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atom.kernels.draw import draw, draw_kernel, refuses_draw
from atom.kernels.greedy import GREEDY, Greedy, greedy_kernel
from atom.kernels.registry import Kernels, Problem, device_arch

from .filters import floor_by_sort, min_p_floor, ties_beyond, top_k_floor, top_p_floor
from .logprobs import Logprobs, logprobs_of
from .penalties import TokenCounts
from .random import counters, log_exponential
from .result import FAULTY
from .sampling_params import MAX_LOGIT_BIAS, MAX_STOP
from .sampling_plan import Feature, LaneParams, Plan, Upload, Word
from .sequence import Sequence

TILE = 512  # tokens of a first-stage candidate
_STOP_ROOM = 2 * MAX_STOP  # stop token ids of a request, and the model's EOS ids


@dataclass(frozen=True)
class Sampled:
    """What a step sampled, on the device.

    tokens        int64 [S], valid token ids in any case: what the next step may read at once
    told          int64 [S], the same for the host, on the device or in page-locked memory; FAULTY (-1) where the row's
                  logits hold a NaN or +inf, or all its tokens are forbidden: its token means nothing, and the sequence
                  should end with an error
    logprobs      of the rows with num_logprobs >= 0, in their order; None if there are none
    num_logprobs  int32 [S] on the host: alternatives to report for each row, -1 for no logprobs
    """

    tokens: Tensor
    told: Tensor
    logprobs: Logprobs | None
    num_logprobs: NDArray[np.int32]


class Sampler:
    """State by lane, and the sampling of a step. Used by one thread, in the order of the steps.

    seed         makes the seeds of requests without one reproducible (by order of admission)
    last_tokens  int64 [num_lanes] on the device: the token that each lane sampled last
    """

    def __init__(
        self,
        num_lanes: int,
        vocab_size: int,
        device: torch.device | str,
        seed: int | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._upload = Upload(self.device)
        self._random = random.Random(seed)
        self._params = LaneParams(num_lanes, vocab_size)
        self._counts = TokenCounts(num_lanes, vocab_size, self.device)
        self._bias_ids = torch.zeros(num_lanes, MAX_LOGIT_BIAS, dtype=torch.int64, device=self.device)
        self._bias = torch.zeros(num_lanes, MAX_LOGIT_BIAS, device=self.device)
        self._stop_ids = torch.zeros(num_lanes, _STOP_ROOM, dtype=torch.int64, device=self.device)
        self.last_tokens = torch.zeros(num_lanes, dtype=torch.int64, device=self.device)
        problem = Problem(device_arch(self.device), K=vocab_size)
        may = self.device.type == "cuda" and kernels == "auto"
        self._greedy: Greedy | None = None  # for steps whose rows only want their best token
        if may and GREEDY.runs(problem):
            self._greedy = GREEDY.choose(problem).build()
        self._draws = may and refuses_draw(problem) is None  # for steps whose rows choose by their logits as they are
        self._num_tiles = -(-vocab_size // TILE)
        self._counters = counters(self._num_tiles + TILE, self.device)

    def warm_up(self) -> None:
        """Compile or load what steps will run."""
        if self._greedy is not None:
            greedy_kernel()
        if self._draws:
            draw_kernel()

    def admit(self, lane: int, sequence: Sequence) -> None:
        """Load a sequence into its lane, with the tokens it has: the prompt, and after a preemption its output."""
        params, num_prompt = sequence.params, sequence.num_prompt
        output = sequence.token_ids[num_prompt:]
        stops = sorted(sequence.stop_token_ids) if params.min_tokens > len(output) else []
        assert len(stops) <= _STOP_ROOM, f"{len(stops)} EOS and stop token ids, room for {_STOP_ROOM}"
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        features = self._params.load(lane, params, seed, sequence.index, len(output), len(stops))
        if stops:
            self._stop_ids[lane] = self._upload(_padded(stops, _STOP_ROOM, stops[0]))
        if Feature.BIAS in features:
            ids, bias = zip(*params.logit_bias, strict=True)
            self._bias_ids[lane] = self._upload(_padded(ids, MAX_LOGIT_BIAS, 0))
            self._bias[lane] = self._upload(_padded(bias, MAX_LOGIT_BIAS, 0.0)).float()
        if Feature.PENALTIES in features:
            entries = self._counts.entries(sequence.token_ids[:num_prompt], output)
            self._counts.load(lane, self._upload(entries))

    def sample(
        self,
        logits: Tensor,
        lanes: NDArray[np.int32],
        masks_stop: NDArray[np.bool_],
        mask: NDArray[np.int32] | Tensor | None = None,
        on_device: Tensor | None = None,
    ) -> Sampled:
        """The next token of each of S lanes, which is their last one from then on. Nothing waits for the device.

        logits      [S, V], any float dtype; not changed
        lanes       int32 [S], each once; greedy ones without penalties may come several times, for drafts
        masks_stop  bool [S], the lane's EOS and stop token ids must not be sampled (`Batch.masks_stop`)
        mask        int32 [S, ceil(V / 32)], bit t % 32 of word t // 32 set where token t is allowed; None allows all
        on_device   int64 [S], the lanes, where they lie on the device already
        """
        if on_device is None:
            on_device = self._upload(lanes.astype(np.int64))
        return self.run(logits, self.plan(lanes, masks_stop, mask), on_device)

    def plan(
        self,
        lanes: NDArray[np.int32],
        masks_stop: NDArray[np.bool_],
        mask: NDArray[np.int32] | Tensor | None = None,
    ) -> Plan:
        """The host's part of `sample`: what `run` is to do, on the device. Moves the lanes' output index on."""
        if isinstance(mask, np.ndarray):
            mask = self._upload(mask)
        return self._params.plan(lanes, masks_stop, mask, self._upload)

    def run(self, raw: Tensor, plan: Plan, lanes: Tensor) -> Sampled:
        """The device's part of `sample`: a fixed sequence of kernels for a plan's features, widths and row counts."""
        if not len(raw):
            none = torch.zeros(0, dtype=torch.int64, device=raw.device)
            return Sampled(none, none, None, plan.num_logprobs)
        chosen = self._run_kernel(raw, plan, lanes)
        if chosen is not None:
            tokens, told = chosen
            return Sampled(tokens, told, self._logprobs(raw, tokens, plan), plan.num_logprobs)
        logits = self._shape_logits(raw, plan)
        largest, tokens = logits.max(-1)
        if Feature.RANDOM in plan.features:
            tokens, largest = self._draw(logits, largest, tokens, plan)
        faulty = (largest - largest) != 0  # infinite, or no number
        tokens = tokens.masked_fill(faulty, 0)
        if Feature.PENALTIES in plan.features:
            self._counts.add(lanes, tokens)
        self.last_tokens[lanes] = tokens
        told = tokens.masked_fill(faulty, FAULTY)
        return Sampled(tokens, told, self._logprobs(raw, tokens, plan), plan.num_logprobs)

    def _run_kernel(self, raw: Tensor, plan: Plan, lanes: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tokens and what the host is told, where one kernel does all of it; else None."""
        if raw.dtype != torch.bfloat16 or not raw.is_contiguous():
            return None
        if self._greedy is not None and plan.is_greedy:
            return self._greedy(raw, lanes, self.last_tokens)
        if self._draws and plan.is_plain and plan.words is not None:
            return draw(raw, plan.words, self._counters, lanes, self.last_tokens)
        return None

    def _shape_logits(self, raw: Tensor, plan: Plan) -> Tensor:
        """Mask, bias, forbidden stop tokens, penalties: what greedy sampling obeys too."""
        wanted = plan.features & (Feature.BIAS | Feature.PENALTIES)
        if not wanted and not plan.stop_width and plan.mask is None:
            return raw
        logits = raw.to(torch.float32, copy=True)
        if plan.mask is not None:
            logits.masked_fill_(~allowed(plan.mask, self.vocab_size), -torch.inf)
        if plan.words is None:
            return logits
        lanes, floats = plan.words[Word.LANE], plan.floats()
        if plan.bias_width:
            width = plan.bias_width
            logits.scatter_add_(1, self._bias_ids[lanes, :width], self._bias[lanes, :width])
        if plan.stop_width:
            ids = self._stop_ids[lanes, : plan.stop_width]
            logits.scatter_add_(1, ids, floats[Word.STOP][:, None].expand_as(ids))
        if Feature.PENALTIES in plan.features:
            penalties = floats[Word.PRESENCE], floats[Word.FREQUENCY], floats[Word.REPETITION]
            logits = self._counts.apply(logits, lanes, *penalties)
        return logits

    def _draw(self, logits: Tensor, largest: Tensor, best: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Tokens [S], drawn where the lane has a temperature, and the largest scaled logits [S]."""
        assert plan.words is not None
        floats = plan.floats()
        temperature = floats[Word.TEMPERATURE]
        size, width = len(logits), self._num_tiles * TILE
        scaled = logits.new_empty(size, width, dtype=torch.float32)
        scaled[:, self.vocab_size :] = -torch.inf
        torch.div(logits, temperature[:, None], out=scaled[:, : self.vocab_size])
        largest = largest / temperature
        floor = self._floor(scaled, largest, plan, floats)
        if floor is not None:
            scaled.masked_fill_(scaled < floor[:, None], -torch.inf)
        tiles = scaled.view(size, self._num_tiles, TILE)
        mass = scaled.softmax(-1).view_as(tiles).sum(-1)  # [S, tiles]
        noise = log_exponential(plan.words[Word.KEY], self._counters)  # float64, as the differences below
        tile = (mass.log() - noise[:, TILE:]).argmax(-1, keepdim=True)
        inside = tiles.gather(1, tile[:, :, None].expand(-1, 1, TILE))[:, 0]  # [S, TILE]
        token = (inside - noise[:, :TILE]).argmax(-1).add_(tile[:, 0], alpha=TILE)
        return torch.where(floats[Word.GREEDY] > 0, best, token), largest

    def _floor(self, scaled: Tensor, largest: Tensor, plan: Plan, floats: dict[Word, Tensor]) -> Tensor | None:
        """The threshold [S] that min-p, top-k and top-p set together; None if no row has any."""
        if not plan.features & (Feature.MIN_P | Feature.TOP_K | Feature.SORT):
            return None
        assert plan.words is not None
        floor = min_p_floor(largest, floats[Word.LOG_MIN_P])
        if Feature.TOP_K in plan.features:
            rows = plan.rows[Feature.TOP_K]
            logits, old, top_k, share = _at(rows, scaled, floor, plan.words[Word.TOP_K], floats[Word.TOP_P])
            best_k = logits.topk(plan.max_top_k, dim=-1).values
            new = torch.maximum(old, top_k_floor(best_k, top_k))
            if Feature.TOP_P_OF_TOP_K in plan.features:
                nucleus = top_p_floor(best_k, new, share, ties_beyond(logits, best_k, new))
                new = torch.where(share < 1, torch.maximum(new, nucleus), new)
            floor = new if rows is None else floor.index_copy(0, rows, new)
        if Feature.SORT in plan.features:
            rows = plan.rows[Feature.SORT]
            new = floor_by_sort(*_at(rows, scaled, floor, plan.words[Word.TOP_K], floats[Word.TOP_P]))
            floor = new if rows is None else floor.index_copy(0, rows, new)
        return floor

    def _logprobs(self, raw: Tensor, tokens: Tensor, plan: Plan) -> Logprobs | None:
        if Feature.LOGPROBS not in plan.features:
            return None
        rows = plan.rows[Feature.LOGPROBS]
        if rows is not None:
            raw, tokens = raw[rows], tokens[rows]
        return logprobs_of(raw, tokens, int(plan.num_logprobs.max()))


def allowed(mask: Tensor, vocab_size: int) -> Tensor:
    """bool [S, vocab_size] of a packed mask int32 [S, ceil(vocab_size / 32)]."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).bool().view(len(mask), -1)[:, :vocab_size]


def _at(rows: Tensor | None, *values: Tensor) -> list[Tensor]:
    """Those rows of each; all of them if it is None."""
    return [x if rows is None else x[rows] for x in values]


def _padded(values: list[int] | tuple[float, ...], length: int, padding: float) -> np.ndarray:
    row = np.full(length, padding, dtype=np.float64 if isinstance(padding, float) else np.int64)
    row[: len(values)] = values
    return row
