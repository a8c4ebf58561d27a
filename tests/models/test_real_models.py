"""Real models against transformers, where a directory of them is at hand.

ATOM_TEST_MODELS names a directory whose sub-directories are models (config, safetensors, tokenizer).
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atom.models.generate import generate
from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_tokenizer

ROOT = os.environ.get("ATOM_TEST_MODELS", "")
MODELS = sorted(path.parent for path in Path(ROOT).glob("*/config.json")) if ROOT else []
TEXT = (
    "The aurochs was a large wild ox that lived in Europe, Asia and North Africa. It is the ancestor of domestic "
    "cattle. The last known animal died in the forest of Jaktorów in Poland in 1627, after a long decline in which "
    "its range had shrunk to a single royal hunting ground, guarded by gamekeepers who were freed of all taxes."
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="ATOM_TEST_MODELS names no directory with models"),
]


def transformers_logits(path: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: Tensor = model(tokens[None]).logits[0]
    del model
    gc.collect()
    return logits


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_logits_equal_transformers(path: Path) -> None:
    tokens = torch.tensor(load_tokenizer(path).encode(TEXT)[:64])
    assert len(tokens) == 64
    expected = transformers_logits(path, tokens)
    model = load_model(path)
    kv, stepwise = DenseKV(model.config), DenseKV(model.config, max_len=64)
    with torch.inference_mode():
        got = model.logits(model(tokens, kv.positions(64), kv))
        model(tokens[:56], stepwise.positions(56), stepwise)
        for position in range(56, 64):
            hidden = model(tokens[position : position + 1], stepwise.positions(1), stepwise)
        last = model.logits(hidden)[0]
    scale = expected.abs().max()
    print(
        f"{path.name}: largest logit {scale:.1f}, prefill off by {(got - expected).abs().max():.2e}, "
        f"decode by {(last - expected[-1]).abs().max():.2e}"
    )
    torch.testing.assert_close(got, expected, atol=1e-5 * float(scale), rtol=0)
    torch.testing.assert_close(last, expected[-1], atol=1e-5 * float(scale), rtol=0)


@pytest.mark.parametrize("path", MODELS[:1], ids=lambda path: path.name)
def test_generation_is_repeatable(path: Path) -> None:
    model, prompt = load_model(path), load_tokenizer(path).encode("The capital of France is")
    assert list(generate(model, prompt, 4)) == list(generate(model, prompt, 4))
