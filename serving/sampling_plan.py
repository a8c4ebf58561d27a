"""What the rows of a step ask of the sampler: parameters by lane on the host, and one upload a step.

Everything a draw depends on, the index of the output token included, is known to the host when a step is launched: only
tokens are not. So parameters stay in a numpy array by lane, and each step sends its rows' columns in a single copy.
A step whose lanes are all greedy sends nothing.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atom.kernels.host_memory import STEPS_KEPT, HostRing, bring

from .random import sample_seed, step_keys
from .sampling_params import SamplingParams

MAX_CANDIDATES = (
    1024  # a larger top_k is found by sorting rows, a few at a time: torch.topk would need them all at once
)


STEP_ARRAYS = 4  # that a step sends at most


class Feature(IntFlag):
    """What a lane's request uses; work that no lane of a step asks for is not done."""

    RANDOM = 1
    MIN_P = 2
    TOP_K = 4  # of MAX_CANDIDATES at most
    TOP_P_OF_TOP_K = 8  # the threshold lies among the top_k largest
    SORT = 16  # a larger top_k, or top_p without one
    PENALTIES = 32
    BIAS = 64
    LOGPROBS = 128


class Word(IntEnum):
    """64-bit words of a lane; the rows of `Plan.words`. From TEMPERATURE on they are float64."""

    KEY = 0  # of the draw
    LANE = 1
    TOP_K = 2
    TEMPERATURE = 3
    LOG_MIN_P = 4
    TOP_P = 5
    PRESENCE = 6
    FREQUENCY = 7
    REPETITION = 8
    GREEDY = 9  # 1 if the best token is taken, else 0
    STOP = 10  # what is added to the logits of stop tokens: 0 or -inf


@dataclass(frozen=True)
class Plan:
    """What to do with the logits of a step's S rows.

    features       what any row asks for
    words          int64 [len(Word), S] on the device; None if no row needs a parameter
    mask           int32 [S, ceil(V / 32)] on the device: bit t % 32 of word t // 32 allows token t; None allows all
    rows           the rows that use a feature, int64 on the device, or None for all of them; by feature
    max_top_k      largest top_k of the rows that use TOP_K
    bias_width     largest number of biased tokens of a row; stop_width: of stop tokens that must not be sampled
    num_logprobs   for each row, the alternatives to report, -1 for none: int32 [S], on the host
    """

    features: Feature
    words: Tensor | None
    mask: Tensor | None
    rows: dict[Feature, Tensor | None]
    max_top_k: int
    bias_width: int
    stop_width: int
    num_logprobs: NDArray[np.int32]

    @property
    def is_plain(self) -> bool:
        """Every row chooses by its logits as they are: no penalty, bias, or mask."""
        return not self.features & (Feature.PENALTIES | Feature.BIAS) and not self.stop_width and self.mask is None

    @property
    def is_greedy(self) -> bool:
        """Every row takes the largest of its logits as they are."""
        return self.is_plain and Feature.RANDOM not in self.features

    def floats(self) -> dict[Word, Tensor]:
        """The float parameters, float32 [S] each."""
        assert self.words is not None
        values = self.words[Word.TEMPERATURE :].view(torch.float64).float()
        return {word: values[word - Word.TEMPERATURE] for word in Word if word >= Word.TEMPERATURE}


class LaneParams:
    """The parameters of every lane, on the host."""

    def __init__(self, num_lanes: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._words = np.zeros((len(Word), num_lanes), dtype=np.int64)
        self._floats = self._words.view(np.float64)
        self._words[Word.LANE] = np.arange(num_lanes)
        self._seeds = np.zeros(num_lanes, dtype=np.uint64)
        self._indices = np.zeros(num_lanes, dtype=np.uint64)
        self._features = np.zeros(num_lanes, dtype=np.int64)
        self._bias_widths = np.zeros(num_lanes, dtype=np.int32)
        self._stop_widths = np.zeros(num_lanes, dtype=np.int32)
        self._num_logprobs = np.zeros(num_lanes, dtype=np.int32)
        self._last: Asked | None = None  # what the last step's lanes ask for

    def load(self, lane: int, params: SamplingParams, seed: int, sample: int, index: int, num_stops: int) -> Feature:
        """Take a request's parameters; returns what they use.

        seed    of the request; sample: the number of the sample among its n
        index   of the next output token
        """
        features = _features(params, self.vocab_size)
        self._last = None
        words, floats = self._words[:, lane], self._floats[:, lane]
        words[Word.TOP_K] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        floats[Word.TEMPERATURE] = params.temperature if Feature.RANDOM in features else 1.0
        floats[Word.GREEDY] = params.is_greedy
        floats[Word.LOG_MIN_P] = np.log(params.min_p) if Feature.MIN_P in features else -np.inf
        floats[Word.TOP_P] = params.top_p
        floats[Word.PRESENCE] = params.presence_penalty
        floats[Word.FREQUENCY] = params.frequency_penalty
        floats[Word.REPETITION] = params.repetition_penalty
        self._seeds[lane] = sample_seed(seed, sample)
        self._indices[lane] = index
        self._features[lane] = int(features)
        self._bias_widths[lane] = len(params.logit_bias)
        self._stop_widths[lane] = num_stops
        self._num_logprobs[lane] = -1 if params.logprobs is None else params.logprobs
        return features

    def plan(self, lanes: NDArray[np.int32], masks_stop: NDArray[np.bool_], mask: Tensor | None, to: "Upload") -> Plan:
        """What the lanes' next token needs; the output index of those that draw moves on."""
        asked = self._last
        if asked is None or asked.lanes is not lanes:
            asked = self._last = self._ask(lanes, to)
        features, index, is_masked = asked.features, asked.index, masks_stop.any()
        if not features and not is_masked:  # all are greedy, and ask for nothing else: what runs most often
            return Plan(features, None, mask, {}, 0, 0, 0, asked.num_logprobs)
        stop_width, stops = 0, np.zeros(())
        if is_masked:
            masked = masks_stop & (self._stop_widths[index] > 0)
            stop_width = int(self._stop_widths[index].max(initial=0, where=masked))
            stops = np.where(masked, -np.inf, 0.0)
        words = None
        if stop_width or features & ~Feature.LOGPROBS:
            asked.columns[Word.KEY] = step_keys(asked.seeds, self._indices[index]).view(np.int64)
            asked.columns.view(np.float64)[Word.STOP] = stops
            words = to.of_step(asked.columns)
        if Feature.RANDOM in features:
            self._indices[index] += np.uint64(1)
        return Plan(
            features,
            words,
            mask,
            asked.rows,
            max_top_k=asked.max_top_k,
            bias_width=asked.bias_width,
            stop_width=stop_width,
            num_logprobs=asked.num_logprobs,
        )

    def _ask(self, lanes: NDArray[np.int32], to: "Upload") -> "Asked":
        index = lanes.astype(np.intp)
        each = self._features[index]
        features, rows, max_top_k = Feature(int(np.bitwise_or.reduce(each, initial=0))), {}, 0
        for feature in (Feature.TOP_K, Feature.SORT, Feature.LOGPROBS):
            if feature in features:
                (users,) = np.nonzero(each & feature)
                rows[feature] = None if len(users) == len(lanes) else to.of_step(users)
        if Feature.TOP_K in features:
            max_top_k = int(self._words[Word.TOP_K, index].max(initial=0, where=(each & Feature.TOP_K) > 0))
        bias_width = int(self._bias_widths[index].max(initial=0)) if Feature.BIAS in features else 0
        columns, seeds = self._words[:, index], self._seeds[index]
        return Asked(lanes, index, features, self._num_logprobs[index], columns, seeds, rows, max_top_k, bias_width)


@dataclass(frozen=True)
class Asked:
    """What a step's lanes ask for; it stays until a lane is loaded or others come.

    index    intp [S], the lanes, of the type that numpy indexes with
    columns  int64 [len(Word), S], of which KEY and STOP change from step to step
    seeds    uint64 [S]
    The other fields as in Plan.
    """

    lanes: NDArray[np.int32]
    index: NDArray[np.intp]
    features: Feature
    num_logprobs: NDArray[np.int32]
    columns: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    rows: dict[Feature, Tensor | None]
    max_top_k: int
    bias_width: int


class Upload:
    """Host arrays to the device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ring = HostRing(STEP_ARRAYS * STEPS_KEPT)

    def __call__(self, array: np.ndarray) -> Tensor:
        """A copy of the array; from page-locked memory, since a copy from any other would synchronise."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return host.clone()
        return host.pin_memory().to(self.device, non_blocking=True)

    def of_step(self, array: np.ndarray) -> Tensor:
        """The same for one of a step's few arrays, on whose way the GPU need not stand still."""
        if self.device.type == "cpu":
            return self(array)
        host = self._ring.take(-(-array.nbytes // 16) * 2)
        host.numpy().view(np.uint8)[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        words = torch.empty(2 * len(host), dtype=torch.int32, device=self.device)
        bring(host.view(torch.int32), words)
        dtype = torch.from_numpy(array[:0]).dtype
        return words.view(torch.uint8)[: array.nbytes].view(dtype).view(array.shape)


def _features(params: SamplingParams, vocab_size: int) -> Feature:
    features = Feature(0)
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
        features |= Feature.PENALTIES
    if params.logit_bias:
        features |= Feature.BIAS
    if params.logprobs is not None:
        features |= Feature.LOGPROBS
    if params.is_greedy:  # no filter drops the most likely token
        return features
    features |= Feature.RANDOM
    if params.min_p:
        features |= Feature.MIN_P
    if 0 < params.top_k < vocab_size:
        features |= Feature.TOP_K if params.top_k <= MAX_CANDIDATES else Feature.SORT
    if params.top_p < 1:
        features |= Feature.TOP_P_OF_TOP_K if Feature.TOP_K in features else Feature.SORT
    return features
