from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atom.serving.logprobs import unpack
from atom.serving.request import Request
from atom.serving.result import FAULTY
from atom.serving.sampler import Sampled, Sampler, allowed
from atom.serving.sampling_params import SamplingParams
from atom.serving.sequence import Sequence

from .sampling_definition import probabilities

PROMPT = (1, 2, 2)
CASES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=2.0),
    "min_p": SamplingParams(min_p=0.2),
    "top_k": SamplingParams(top_k=5),
    "top_k_beyond": SamplingParams(top_k=10**6),
    "top_k_large": SamplingParams(top_k=1090, temperature=2.0),
    "top_k_large_top_p": SamplingParams(top_k=1090, top_p=0.99, min_p=1e-4),
    "top_p": SamplingParams(top_p=0.6),
    "top_k_top_p": SamplingParams(top_k=9, top_p=0.7, temperature=1.3),
    "all_filters": SamplingParams(top_k=6, top_p=0.9, min_p=0.05, temperature=1.1),
    "min_p_top_p": SamplingParams(top_p=0.8, min_p=0.1),
    "penalties": SamplingParams(presence_penalty=0.6, frequency_penalty=-0.4, repetition_penalty=1.2),
    "bias": SamplingParams(logit_bias=((3, 2.5), (0, -100.0), (7, 1.0)), top_p=0.9),
    "stops": SamplingParams(min_tokens=50, stop_token_ids=(4, 2)),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=8,
        top_p=0.9,
        min_p=0.02,
        presence_penalty=0.3,
        repetition_penalty=0.9,
        logit_bias=((5, 1.5),),
        min_tokens=50,
        stop_token_ids=(9,),
    ),
}


def sequence(
    params: SamplingParams, output: SequenceOf[int] = (), index: int = 0, eos: tuple[int, ...] = ()
) -> Sequence:
    made = Sequence(0, Request("r", PROMPT, params, eos), index, 10**6, (0, 0))
    made.token_ids += output
    return made


def sample(sampler: Sampler, logits: Tensor, masks_stop: Any = False, mask: Any = None, lanes: Any = None) -> Sampled:
    lanes = np.arange(len(logits), dtype=np.int32) if lanes is None else np.array(lanes, dtype=np.int32)
    return sampler.sample(logits, lanes, np.broadcast_to(np.array(masks_stop), lanes.shape), mask)


def chi_square_limit(degrees: int) -> float:
    """The value that a chi-square variable passes once in 100000 times (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.26 * (2 / (9 * degrees)) ** 0.5) ** 3


def assert_distributed(counts: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's test; rare tokens are put together until a class expects ten draws."""
    assert not counts[expected == 0].any(), "a token that is filtered out was sampled"
    order = np.argsort(expected)
    classes = (np.cumsum(expected[order]) * counts.sum() // 10).astype(np.int64)
    _, classes = np.unique(classes, return_inverse=True)
    wanted = np.bincount(classes, expected[order]) * counts.sum()
    found = np.bincount(classes, counts[order])
    statistic = ((found - wanted)[wanted >= 5] ** 2 / wanted[wanted >= 5]).sum()
    assert statistic < chi_square_limit(max(1, int((wanted >= 5).sum()) - 1))


@pytest.mark.parametrize("vocab", [37, 1100])  # one tile; three, the last one partly filled
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_distributed_as_defined(name: str, vocab: int) -> None:
    params, lanes, output = CASES[name], 500, (5, 5, 6)
    sampler = Sampler(lanes, vocab, "cpu")
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 2
    stops = params.stop_token_ids
    expected = probabilities(logits[0].double().numpy(), params, PROMPT, output, stops)
    counts = np.zeros(vocab)
    for seed in range(8):
        if not seed or "penalties" in name or name == "everything":  # the counts of another token change the penalties
            for lane in range(lanes):
                sampler.admit(lane, sequence(replace(params, seed=seed), output, index=lane))
        got = sample(sampler, logits.expand(lanes, -1), masks_stop=bool(stops))
        assert not (got.told == FAULTY).any()
        counts += np.bincount(got.tokens.numpy(), minlength=vocab)
    assert_distributed(counts, expected)


def test_a_skewed_draw_fails_the_test_of_distributions() -> None:
    expected = np.array([0.5, 0.3, 0.2])
    with pytest.raises(AssertionError):
        assert_distributed(np.array([2150, 1150, 700]), expected)


def test_draws_of_steps_seeds_and_samples_differ() -> None:
    """Uniform over many tokens: equal draws would be rare."""
    sampler, flat = Sampler(4, 5000, "cpu", seed=3), torch.zeros(4, 5000)
    seeds: list[tuple[int | None, int]] = [(0, 0), (0, 1), (1, 0), (None, 0)]
    for lane, (seed, index) in enumerate(seeds):
        sampler.admit(lane, sequence(SamplingParams(seed=seed), index=index))
    drawn = torch.cat([sample(sampler, flat).tokens for _ in range(30)])
    assert len(drawn.unique()) > 110


def test_a_seeded_sampler_draws_the_same_seeds() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(2, 5000, "cpu", seed=seed)
        for lane in range(2):
            sampler.admit(lane, sequence(SamplingParams()))
        return [int(t) for _ in range(5) for t in sample(sampler, torch.zeros(2, 5000)).tokens]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def logits_of(tokens: SequenceOf[int], vocab: int) -> Tensor:
    """A model: logits [vocab] that depend on all tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return torch.randn(vocab, generator=generator) * 2


def run(params: SamplingParams, vocab: int, steps: int, admit_again: SequenceOf[int] = ()) -> list[int]:
    """A sequence's output, alone; it is admitted to another lane before the steps of `admit_again`."""
    sampler, tokens, lane = Sampler(3, vocab, "cpu"), list(PROMPT), 0
    sampler.admit(lane, sequence(params))
    for step in range(steps):
        if step in admit_again:
            lane += 1
            sampler.admit(lane, sequence(params, tokens[len(PROMPT) :]))
        masks = step + 1 < params.min_tokens
        tokens += sample(sampler, logits_of(tokens, vocab)[None], masks, lanes=[lane]).tokens.tolist()
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_tokens_in_any_batch_and_after_preemption(name: str) -> None:
    vocab, steps = 1100, 12
    params = replace(CASES[name], seed=5)
    alone = run(params, vocab, steps)
    assert run(params, vocab, steps, admit_again=(3, 8)) == alone
    rng, sampler = np.random.default_rng(0), Sampler(8, vocab, "cpu")
    tokens = list(PROMPT)
    sampler.admit(2, sequence(params))
    others = list(CASES.values())
    for step in range(steps):
        lanes = [2, *rng.permutation([0, 1, 3, 4, 5, 6, 7])[: rng.integers(1, 8)]]
        rng.shuffle(lanes)
        for lane in lanes:
            if lane != 2 and (step == 0 or rng.random() < 0.5):
                sampler.admit(lane, sequence(others[rng.integers(len(others))]))
        logits = torch.randn(len(lanes), vocab)
        row = lanes.index(2)
        logits[row] = logits_of(tokens, vocab)
        masks = rng.random(len(lanes)) < 0.5
        masks[row] = step + 1 < params.min_tokens
        tokens.append(int(sample(sampler, logits, masks, lanes=lanes).tokens[row]))
    assert tokens[len(PROMPT) :] == alone


def test_greedy_is_the_first_of_the_largest_whatever_else_is_asked_for() -> None:
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (6, 700)).float()
    sampler = Sampler(6, 700, "cpu")
    greedy = SamplingParams(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=1)
    for lane in range(6):
        sampler.admit(lane, sequence(greedy if lane < 5 else SamplingParams(temperature=1e-6)))
    assert sample(sampler, logits).tokens.tolist() == logits.numpy().argmax(-1).tolist()
    sampler.admit(3, sequence(SamplingParams(temperature=0.7)))  # the others of a mixed step
    got = sample(sampler, logits).tokens
    rows = [0, 1, 2, 4, 5]
    assert got[rows].tolist() == logits[rows].numpy().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513])
def test_any_vocabulary_and_dtype(dtype: torch.dtype, vocab: int) -> None:
    sampler, logits = Sampler(2, vocab, "cpu"), torch.randn(2, vocab).to(dtype)
    before = logits.clone()
    for params in (SamplingParams(temperature=0), SamplingParams(), CASES["top_k_top_p"], SamplingParams(logprobs=5)):
        for lane in range(2):
            sampler.admit(lane, sequence(params))
        for _ in range(3):
            got = sample(sampler, logits)
            assert got.tokens.dtype == torch.int64
            assert ((got.tokens >= 0) & (got.tokens < vocab)).all()
            assert not (got.told == FAULTY).any()
    assert torch.equal(logits, before), "the logits were changed"


def test_no_rows() -> None:
    sampler = Sampler(2, 9, "cpu")
    got = sample(sampler, torch.zeros(0, 9))
    assert got.tokens.shape == got.told.shape == (0,)
    assert got.logprobs is None


def test_tokens_that_cannot_come_never_do() -> None:
    """-inf logits, under every filter; what is left may be less than top_k asks for."""
    logits = torch.full((1, 900), -torch.inf)
    logits[0, [7, 600]] = torch.tensor([1.0, 0.5])
    for params in CASES.values():
        sampler = Sampler(1, 900, "cpu")
        sampler.admit(0, sequence(replace(params, logit_bias=(), stop_token_ids=())))
        for _ in range(10):
            assert sample(sampler, logits).tokens.item() in (7, 600)


@pytest.mark.parametrize("name", ["greedy", *CASES])
def test_rows_without_numbers_are_reported_and_harm_no_other(name: str) -> None:
    params = SamplingParams(temperature=0) if name == "greedy" else replace(CASES[name], seed=1)
    torch.manual_seed(0)
    good = torch.randn(2, 1100)
    bad = [good.clone() for _ in range(4)]
    bad[0][0] = torch.nan
    bad[1][0, 600] = torch.nan
    bad[2][0, 3] = torch.inf
    bad[3][0] = -torch.inf

    def tokens(logits: Tensor) -> tuple[list[int], Tensor]:
        sampler = Sampler(2, 1100, "cpu")
        for lane in range(2):
            sampler.admit(lane, sequence(params, index=lane))
        got = sample(sampler, logits)
        assert ((got.tokens >= 0) & (got.tokens < 1100)).all(), "the next step would read beyond the embedding"
        return got.told.tolist(), got.told == FAULTY

    expected, _ = tokens(good)
    for logits in bad:
        got, faulty = tokens(logits)
        assert got == [FAULTY, expected[1]]
        assert faulty.tolist() == [True, False]


def test_stop_tokens_are_not_sampled_where_they_are_masked() -> None:
    sampler, logits = Sampler(3, 50, "cpu"), torch.zeros(3, 50)
    logits[:, [7, 30]] = 40.0
    for lane, params in enumerate(
        [
            SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(7,)),
            SamplingParams(seed=1, min_tokens=5),
            SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(7,), ignore_eos=True),
        ]
    ):
        sampler.admit(lane, sequence(params, eos=(30,)))
    got = [sample(sampler, logits, [True, True, True]).tokens.tolist() for _ in range(20)]
    assert all(a not in (7, 30) and b == 7 and c == 30 for a, b, c in got)
    got = [sample(sampler, logits, [False, False, True]).tokens.tolist() for _ in range(20)]
    assert all(a == 7 and b in (7, 30) and c == 30 for a, b, c in got)


def test_a_mask_leaves_what_it_allows() -> None:
    vocab = 75
    sampler = Sampler(3, vocab, "cpu")
    for lane, temperature in enumerate([0.0, 1.0, 1.0]):
        sampler.admit(lane, sequence(SamplingParams(temperature=temperature)))
    may = torch.zeros(3, vocab, dtype=torch.bool)
    may[0, [31, 32, 74]] = may[1, [0, 63]] = True
    may[2] = True
    words = np.packbits(np.pad(may.numpy(), ((0, 0), (0, 21))), axis=1, bitorder="little").view(np.int32)
    assert torch.equal(allowed(torch.from_numpy(words), vocab), may)
    logits = torch.randn(3, vocab)
    for _ in range(20):
        a, b, _ = sample(sampler, logits, mask=words).tokens.tolist()
        assert a == max((31, 32, 74), key=lambda t: logits[0, t].item())
        assert b in (0, 63)
    words[1] = 0
    assert [t == FAULTY for t in sample(sampler, logits, mask=words).told.tolist()] == [False, True, False]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    torch.manual_seed(0)
    sampler, logits = Sampler(4, 60, "cpu"), torch.randn(4, 60) * 3
    base = SamplingParams(temperature=0.5, top_k=2, logit_bias=((3, 50.0),), presence_penalty=1.0)
    for lane, number in enumerate([None, 0, 3, 1]):
        sampler.admit(lane, sequence(replace(base, logprobs=number)))
    got = sample(sampler, logits, lanes=[3, 0, 2, 1])
    assert got.num_logprobs.tolist() == [1, -1, 3, 0]
    assert got.logprobs is not None
    values = unpack(got.logprobs.packed, got.num_logprobs[got.num_logprobs >= 0])
    truth = logits.double().log_softmax(-1)
    for row, value, number in zip([0, 2, 3], values, [1, 3, 0], strict=True):
        assert value.token_id == got.tokens[row]
        assert value.logprob == pytest.approx(truth[row, value.token_id].item(), abs=1e-5)
        best = truth[row].sort(descending=True)
        assert [t for t, _ in value.top] == best.indices[:number].tolist()
        assert [p for _, p in value.top] == pytest.approx(best.values[:number].tolist(), abs=1e-5)


def test_a_lane_keeps_nothing_of_its_last_sequence() -> None:
    sampler, logits = Sampler(1, 60, "cpu"), torch.randn(1, 60)
    sampler.admit(0, sequence(CASES["everything"], output=(1,) * 40))
    sample(sampler, logits, True)
    for params in (SamplingParams(seed=2), SamplingParams(seed=2, presence_penalty=1.0, logprobs=2)):
        fresh = Sampler(1, 60, "cpu")
        for each in (sampler, fresh):
            each.admit(0, sequence(params))
        for _ in range(5):
            a, b = sample(sampler, logits, True), sample(fresh, logits, True)
            assert torch.equal(a.tokens, b.tokens)
            assert (a.logprobs is None) == (params.logprobs is None)


class Operations(TorchDispatchMode):
    """Names of the operations, and of those that read or write as many values as there are logits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.names: list[str] = []
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.names.append(name)
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        is_view = isinstance(out, Tensor) and any(out.data_ptr() == t.data_ptr() for t in args if isinstance(t, Tensor))
        if any(t.numel() >= self.size for t in tensors) and (not is_view or name.endswith("_")):
            self.large.append(name)
        return out


def operations(params: SequenceOf[SamplingParams], **kwargs: Any) -> Operations:
    sampler = Sampler(len(params), 3000, "cpu")
    for lane, each in enumerate(params):
        sampler.admit(lane, sequence(each))
    logits = torch.randn(len(params), 3000)
    plan = sampler.plan(np.arange(len(params), dtype=np.int32), np.full(len(params), False))
    with Operations(logits.numel()) as record:
        sampler.run(logits, plan, torch.arange(len(params)))
    return record


def test_greedy_steps_cost_one_maximum() -> None:
    record = operations([SamplingParams(temperature=0)] * 4)
    assert record.large == ["max"]
    assert len(record.names) <= 7


def test_only_what_is_asked_for_is_done() -> None:
    def large(*params: SamplingParams) -> list[str]:
        return operations(params).large

    plain = [name for name in large(*[SamplingParams()] * 4) if name not in ("new_empty", "slice")]
    assert plain == ["max", "div", "_softmax", "sum", "gather"]  # the last reads one tile a row
    assert "sort" not in large(*[CASES["top_k_top_p"]] * 4)
    assert "topk" not in large(*[CASES["min_p"]] * 4)
    assert large(*[SamplingParams(logprobs=2)] * 4).count("topk") == 1


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name: str) -> None:
    names = operations([CASES[name], replace(CASES[name], logprobs=3), SamplingParams()]).names
    waiting = {"_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero", "equal", "unique"}
    assert not waiting & set(names)
