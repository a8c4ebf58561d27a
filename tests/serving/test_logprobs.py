import math

import pytest
import torch
from torch import Tensor

from atom.serving.logprobs import logprobs_of, prompt_logprobs, unpack
from atom.serving.openai.logprobs import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_ranks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, 40) * 4).to(dtype)
    tokens = torch.tensor([0, 39, int(logits[2].argmax()), int(logits[3].argmin()), 7])
    wanted = logits.double().log_softmax(-1)
    widths = [3, 0, 1, 3, 2]
    for row, found in enumerate(unpack(logprobs_of(logits, tokens, 3).packed, widths)):
        token = int(tokens[row])
        assert found.token_id == token
        assert found.logprob == pytest.approx(wanted[row, token].item(), abs=1e-5)
        assert found.rank == 1 + int((logits[row] > logits[row, token]).sum())
        assert len(found.top) == widths[row]
        assert [p for _, p in found.top] == pytest.approx(
            wanted[row].sort(descending=True).values[: widths[row]].tolist(), abs=1e-5
        )
        assert all(p == pytest.approx(wanted[row, t].item(), abs=1e-5) for t, p in found.top)


def test_more_alternatives_than_tokens_and_none_at_all() -> None:
    packed = logprobs_of(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), 5).packed
    assert [token for token, _ in unpack(packed, [5])[0].top] == [1, 0]
    assert unpack(logprobs_of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2).packed, []) == []


def test_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    (found,) = unpack(logprobs_of(logits, torch.tensor([1]), 1).packed, [1])
    assert found.logprob == -math.inf
    assert found.rank == 3
    assert [finite(x) for x in (-math.inf, math.nan, -1.5)] == [-9999.0, -9999.0, -1.5]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 23])
def test_prompts_in_chunks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four positions, then of as many as fit: no more logits than that are ever held."""
    monkeypatch.setattr("atom.serving.logprobs.FIRST_ROWS", 4)
    monkeypatch.setattr("atom.serving.logprobs.CHUNK_BYTES", 6 * 50 * 4)
    torch.manual_seed(0)
    whole = torch.randint(-3, 4, (length + 50, 8)).float()  # products of whole numbers are exact in any chunk
    hidden, weight, tokens = whole[:length], whole[length:], torch.randint(0, 50, (length,))
    rows: list[int] = []

    def head(part: Tensor) -> Tensor:
        rows.append(len(part))
        return part @ weight.T

    found = prompt_logprobs(head, hidden, tokens, 2)
    assert torch.equal(found.packed, logprobs_of(hidden @ weight.T, tokens, 2).packed)
    assert max(rows) <= 6
    assert sum(rows) == length
