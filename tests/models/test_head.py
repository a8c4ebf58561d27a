"""The head in INT8: close to the full one, for heads of their own and tied ones, into a buffer or not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.models.kv import DenseKV
from atom.models.loader import load_model
from atom.models.model import Model

from .random_models import LLAMA, random_model, save_model


def hidden_states(model: Model) -> Tensor:
    kv = DenseKV(model.config, dtype=model.dtype)
    with torch.inference_mode():
        hidden: Tensor = model(torch.arange(11), kv.positions(11), kv)
    return hidden


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_near_those_of_the_full_head(tied: bool, tmp_path: Path) -> None:
    path = save_model(random_model({**LLAMA, "tie_word_embeddings": tied}), tmp_path / "model")
    full, rounded = load_model(path), load_model(path, head="int8")
    hidden = hidden_states(full)
    wanted, found = full.logits(hidden), rounded.logits(hidden_states(rounded))
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02
    assert "lm_head.weight" not in rounded.state_dict()
    out = torch.empty_like(found)
    assert rounded.logits(hidden, out) is out and torch.equal(out, found)
