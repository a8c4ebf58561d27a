"""The runner on a GPU: graphs, steps in pieces and shared prefixes change no token, and nothing waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.kernels import cascade_sm90
from atom.kernels.cascade_plan import Costs
from atom.serving.batch import Batch
from atom.serving.decode_inputs import KernelInputs
from atom.serving.llm import LLM
from atom.serving.runner import Runner
from atom.serving.sampling_params import SamplingParams

from .driven_steps import MIXED, PROMPTS, drive

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pieces", [(), (12, 24)])
def test_graphs_over_a_cache_of_two_formats_change_no_token(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, ...]
) -> None:
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    wanted, _ = drive(tiny("llama"), "cuda", (1, 2, 4, 8), False, pieces, cache=MIXED)
    found, runner = drive(tiny("llama"), "cuda", (1, 2, 4, 8), True, pieces, cache=MIXED)
    assert found == wanted and len(runner.kv.choices) == 4


def test_graphs_change_no_token(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps on the same kernels, captured and not; and many replays of a graph with other contents."""
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    wanted, _ = drive(tiny("llama"), "cuda", (1, 2, 4, 8, 16, 24), captures=False)
    found, runner = drive(tiny("llama"), "cuda", (1, 2, 4, 8, 16, 24))
    assert found == wanted
    assert runner.buckets is not None and set(runner.buckets._replays) == {
        (size, False) for size in (1, 2, 4, 8, 16, 24)
    }


@pytest.mark.parametrize("num_blocks", [12, 60])
def test_tables_that_stay_are_those_that_would_come(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    """Steps whose first kernel is brought all block tables, and those that bring what is new; with preemptions too."""
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    found, _ = drive(tiny("llama"), "cuda", (1, 2, 4, 8, 16, 24), num_blocks=num_blocks)
    load = KernelInputs.load

    def forgetful(self: KernelInputs, padded: Batch, rings: Any = None) -> torch.Tensor:
        self._decoding = None
        return load(self, padded, rings)

    monkeypatch.setattr(KernelInputs, "load", forgetful)
    wanted, runner = drive(tiny("llama"), "cuda", (1, 2, 4, 8, 16, 24), num_blocks=num_blocks)
    assert runner.buckets is not None and isinstance(runner.buckets._inputs, KernelInputs)
    assert found == wanted


def test_graphs_of_shared_prefixes_change_no_token(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that begin alike: their decodes read the prefix together, captured and not."""
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    monkeypatch.setattr(cascade_sm90, "Costs", lambda *costs: Costs())  # as if nothing cost anything
    monkeypatch.setattr(cascade_sm90, "has_prefix_kernel", lambda config: True)  # compiled now, not beside
    prompts = [[*PROMPTS[4], index] for index in range(9)]
    wanted, _ = drive(tiny("llama"), "cuda", (1, 2, 4, 8), False, (), prompts, 60)
    found, runner = drive(tiny("llama"), "cuda", (1, 2, 4, 8), True, (), prompts, 60)
    assert found == wanted
    assert runner.buckets is not None and any(shares for _, shares in runner.buckets._replays)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_pieces_captured_change_no_token(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    wanted, plain = drive(tiny(family), "cuda", (1, 2, 4, 8), captures=False, pieces=(12, 24))
    found, runner = drive(tiny(family), "cuda", (1, 2, 4, 8), pieces=(12, 24))
    assert found == wanted
    assert plain._pieces is not None and not plain._pieces._pieces
    assert runner._pieces is not None
    count = runner.model.config.num_layers + 1
    assert {size: len(pieces) for size, pieces in runner._pieces._pieces.items()} == {12: count, 24: count}


@pytest.mark.parametrize(("buckets", "pieces"), [((1, 2, 4, 8, 16, 24), ()), ((1, 2, 4, 8), (12, 24)), ((8,), ())])
def test_a_launch_does_not_wait_for_the_gpu(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, buckets: tuple[int, ...], pieces: tuple[int, ...]
) -> None:
    """Nothing in launch synchronises: torch raises where it would."""
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    drive(tiny("llama"), "cuda", buckets, pieces=pieces)  # what is compiled and grown once may wait
    launch, seen = Runner.launch, 0

    def watched(self: Runner, step: Any) -> Any:
        nonlocal seen
        seen += 1
        torch.cuda.set_sync_debug_mode("error" if seen > 3 else "default")
        try:
            return launch(self, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Runner, "launch", watched)
    drive(tiny("llama"), "cuda", buckets, pieces=pieces)
    assert seen > 20


def test_the_cache_takes_what_the_gpu_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    torch.cuda.empty_cache()

    def others() -> int:
        """Bytes of other processes, which come and go."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    total, before = torch.cuda.mem_get_info()[1], others()
    options = {"load_format": "dummy", "device": "cuda", "gpu_memory_utilization": 0.5, "max_num_seqs": 16}
    with LLM("tiny", **options) as llm:
        ours, least, most = torch.cuda.memory_reserved(), *sorted((before, others()))
        assert 0.4 * total < most + ours and least + ours < 0.55 * total
        assert llm.ready.facts["decode_buckets"] == 5 + 8 and llm.ready.runner.depth == 2  # 8: with prompts' rows
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        assert [len(c.token_ids) for c in llm.generate(PROMPTS, params)] == [20] * len(PROMPTS)
        assert llm.engine.stats().used_blocks == 0
