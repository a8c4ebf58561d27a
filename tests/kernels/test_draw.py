"""The sm_90a kernel that draws against the sampler that defines it: on a model of the machine, and on a GPU."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels import draw_config
from atom.kernels.draw import draw, refuses_draw
from atom.kernels.registry import Problem
from atom.serving import random, sampler
from atom.serving.request import Request
from atom.serving.sampler import Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.sampling_plan import Feature, Plan, Word
from atom.serving.sequence import Sequence

from .machine_code import disassemble
from .ptx_memory import Address
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import needs_dsl, ptx

VOCABULARY = 8 * 1024 + 8 * 9  # a second vector for few threads, and a tile that is not full
PARAMS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.3),
    SamplingParams(seed=3, temperature=1.9, min_p=0.05),
    SamplingParams(seed=4, top_k=1),
    SamplingParams(seed=5, top_k=40),
    SamplingParams(seed=6, top_k=5000, temperature=2.0),
    SamplingParams(seed=7, top_p=0.9),
    SamplingParams(seed=8, top_p=0.01),
    SamplingParams(seed=9, top_p=0.99, temperature=2.0),
    SamplingParams(seed=10, top_k=100, top_p=0.8, min_p=0.01, temperature=1.5),
    SamplingParams(temperature=0),
]


def logits_of(rows: int, vocabulary: int) -> Tensor:
    """Plain ones; the last rows with ties, small numbers of both signs, few candidates, no numbers."""
    x = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    x[-1] = torch.nan
    x[-2, 7] = torch.inf
    x[-3] = -torch.inf
    x[-3, [5, 700]] = torch.tensor([-3.0, -3.5])
    x[-4] *= 1e-6
    x[-5] = x[-5].round()
    return x.bfloat16()


def planned(params: list[SamplingParams], vocabulary: int) -> tuple[Sampler, Plan]:
    made = Sampler(len(params), vocabulary, "cpu", seed=0)
    for lane, each in enumerate(params):
        made.admit(lane, Sequence(0, Request("r", (1,), each), lane, 10**6, (0, 0)))
    lanes = np.arange(len(params), dtype=np.int32)
    return made, made.plan(lanes, np.zeros(len(params), dtype=np.bool_))


def test_the_kernel_and_the_sampler_mean_the_same() -> None:
    names = ("KEY", "TOP_K", "TEMPERATURE", "LOG_MIN_P", "TOP_P", "GREEDY")
    assert all(getattr(draw_config, name) == Word[name] for name in names)
    assert draw_config.TILE == sampler.TILE
    assert tuple(random._signed(m) for m in random._MULTIPLIERS) == draw_config.MULTIPLIERS
    assert draw_config.LOG_RANGE == random._LOG_RANGE


@needs_dsl
@pytest.mark.slow
def test_tokens_on_a_model_of_the_machine(tmp_path: Path) -> None:
    from atom.kernels.draw_sm90 import compile_draw

    params = [*PARAMS, *[SamplingParams(seed=20 + i, top_p=0.95, temperature=0.8) for i in range(5)]]
    made, plan = planned(params, VOCABULARY)
    x, lanes = logits_of(len(params), VOCABULARY), torch.arange(len(params)).flip(0)
    wanted = made.run(x, plan, lanes)
    assert plan.words is not None
    found, told, last = np.zeros((3, len(params)), dtype=np.int64)
    arguments = (x.view(torch.int16), plan.words, made._counters, lanes)
    kernel = ptx(compile_draw(f"--keep-ptx --dump-dir {tmp_path}"))
    tensors = [*(Argument(a.numpy()) for a in arguments), Argument(last), Argument(found)]
    kernel.launch((len(params), 1), draw_config.THREADS, [*tensors, Address(told)])
    assert found.tolist() == wanted.tokens.tolist() and told.tolist() == wanted.told.tolist()
    assert last.tolist() == made.last_tokens.tolist()


@needs_dsl
@pytest.mark.slow
def test_machine_code(tmp_path: Path) -> None:
    from atom.kernels.draw_sm90 import compile_draw

    compiled = compile_draw(f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"


def test_what_it_refuses() -> None:
    assert refuses_draw(Problem("sm_90", K=128256)) is None
    assert "at most" in (refuses_draw(Problem("sm_90", K=2**20)) or "")
    assert "multiple of 8" in (refuses_draw(Problem("sm_90", K=50257)) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vocabulary", [8, 520, VOCABULARY, 32000, 128256])
def test_tokens_on_a_gpu(vocabulary: int) -> None:
    """Nearly all: where two candidates nearly tie, float32 may decide otherwise than on a CPU."""
    params = [*PARAMS, *[SamplingParams(seed=20 + i, top_p=0.95, temperature=0.8) for i in range(200)]]
    made, plan = planned(params, vocabulary)
    x, lanes = torch.randn(len(params), vocabulary).bfloat16() * 3, torch.arange(len(params)).flip(0)
    if vocabulary > 1000:
        x = logits_of(len(params), vocabulary)
    wanted = made.run(x, plan, lanes)
    assert plan.words is not None
    last = torch.zeros(len(params), dtype=torch.int64, device="cuda")
    found, told = draw(x.cuda(), plan.words.cuda(), made._counters.cuda(), lanes.cuda(), last)
    torch.cuda.synchronize()
    assert (found.cpu() != wanted.tokens).sum() <= 1 and torch.equal(told < 0, wanted.told < 0)
    assert torch.equal(last.cpu()[lanes], found.cpu())


def test_the_sampler_knows_when_a_draw_is_plain() -> None:
    _, plan = planned(PARAMS, 100)
    assert plan.is_plain and not plan.is_greedy
    for params in (SamplingParams(presence_penalty=1.0), SamplingParams(logit_bias=((1, 1.0),))):
        assert not planned([params], 100)[1].is_plain
    assert Feature.RANDOM in plan.features
