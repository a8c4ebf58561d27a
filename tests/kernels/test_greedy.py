"""The best token of each row: the sm_90a kernel's PTX run on a CPU, its machine code without a GPU, itself on one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.draw_config import FAULTY
from atom.kernels.greedy import build_greedy_sm90, greedy_reference, refuses_greedy
from atom.kernels.registry import Problem

from .machine_code import disassemble
from .ptx_memory import Address
from .ptx_memory import Tensor as Argument
from .test_attention_sm90 import needs_dsl, ptx

VOCABULARY = 8 * 1024 + 24  # some threads have a second vector, most have one


def rows(vocabulary: int = VOCABULARY) -> Tensor:
    """Logits [11, vocabulary] bfloat16: plain ones, ties in a thread and between, both zeros, no numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, vocabulary, generator=generator).bfloat16()
    x[1, [5, 6, vocabulary - 1]] = 30.0
    x[2, [vocabulary - 9, vocabulary - 2]] = 30.0
    x[3] = -torch.inf
    x[3, vocabulary - 1] = -300.0
    x[4] = -1.0
    x[4, 17], x[4, 9] = 0.0, -0.0
    x[5, vocabulary // 2] = torch.nan
    x[6] = torch.nan
    x[7, 3] = torch.inf
    x[8] = -torch.inf
    x[9] = 0.0
    x[10, 0] = -torch.nan
    return x


def reference(x: Tensor, lanes: Tensor, last: Tensor) -> Tensor:
    """int64 [2, rows]: tokens, and what the host is told."""
    return torch.stack(greedy_reference()(x, lanes, last))


def test_the_reference_takes_the_first_of_the_largest() -> None:
    last = torch.full((12,), 77)
    lanes = torch.arange(11).flip(0)
    tokens, told = reference(rows(), lanes, last)
    assert tokens[[1, 2, 3, 4, 9]].tolist() == [5, VOCABULARY - 9, VOCABULARY - 1, 9, 0]
    assert told[5:9].tolist() == [FAULTY] * 4 and told[10] == FAULTY and tokens[[5, 6, 7, 8, 10]].tolist() == [0] * 5
    assert torch.equal(last[lanes], tokens) and last[11] == 77


@pytest.mark.parametrize("vocabulary", [8, 16, VOCABULARY])
@needs_dsl
@pytest.mark.slow
def test_tokens_on_a_model_of_the_machine(vocabulary: int, tmp_path: Path) -> None:
    from atom.kernels.greedy_sm90 import compile_greedy

    x = rows(vocabulary) if vocabulary > 40 else torch.randn(11, vocabulary).bfloat16()
    lanes, last = torch.arange(11).flip(0), torch.full((12,), 77)
    wanted_last = last.clone()
    wanted = reference(x, lanes, wanted_last)
    found, told = np.zeros((2, 11), dtype=np.int64)
    then = last.numpy().copy()
    kernel = ptx(compile_greedy(f"--keep-ptx --dump-dir {tmp_path}"))
    tensors = (Argument(x.view(torch.int16).numpy()), Argument(lanes.numpy()), Argument(then), Argument(found))
    kernel.launch((11, 1), 1024, [*tensors, Address(told)])
    assert np.array_equal(np.stack((found, told)), wanted.numpy())
    assert np.array_equal(then, wanted_last.numpy())


@needs_dsl
@pytest.mark.slow
def test_machine_code(tmp_path: Path) -> None:
    """Spills nothing, and has four loads of 16 bytes under way."""
    from atom.kernels.greedy_sm90 import compile_greedy

    compiled = compile_greedy(f"--keep-cubin --dump-dir {tmp_path}")
    sass = disassemble(compiled.__cubin__, tmp_path)  # type: ignore[attr-defined]
    assert not re.findall(r"\b(?:LDL|STL)\b", sass), "registers spilled"
    assert re.search(r"(LDG\.E\.128[^\n]*\n\s*/\*\w+\*/\s*){4}", sass), "loads wait for each other"


def test_what_it_refuses() -> None:
    assert refuses_greedy(Problem("sm_90", K=128256)) is None
    assert "multiple of 8" in (refuses_greedy(Problem("sm_90", K=50257)) or "")
    assert "bfloat16" in (refuses_greedy(Problem("sm_90", K=128256, dtype="float16")) or "")
    assert "sm_90" in (refuses_greedy(Problem("sm_80", K=128256)) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vocabulary", [8, 32000, VOCABULARY, 128256])
def test_tokens_on_a_gpu(vocabulary: int) -> None:
    x = rows(vocabulary) if vocabulary > 40 else torch.randn(11, vocabulary).bfloat16()
    lanes, last = torch.arange(11).flip(0), torch.full((12,), 77)
    wanted_last = last.clone()
    wanted = reference(x, lanes, wanted_last)
    then = last.cuda()
    found, told = build_greedy_sm90()(x.cuda(), lanes.cuda(), then)
    torch.cuda.synchronize()
    assert torch.equal(torch.stack((found.cpu(), told)), wanted) and torch.equal(then.cpu(), wanted_last)
