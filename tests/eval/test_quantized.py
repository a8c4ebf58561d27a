"""Evaluation of a quantized checkpoint runs its quantized path, and stays independent of batches there."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.eval.compare import compare
from atom.eval.load import Loaded, load
from atom.eval.perplexity import make_windows, measure_perplexity
from atom.eval.run import EvalConfig, evaluate
from atom.eval.texts import load_text
from atom.models.kv import DenseKV
from atom.quant.presets import get_scheme
from atom.quant.schemes import Scheme

WINDOW = 24


@pytest.fixture(scope="module", params=["w8a8", "nvint4"])
def quantized(
    request: pytest.FixtureRequest, model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    """8 bits, and 4 bits with a 4-bit cache: activations and keys and values are rounded as they come."""
    folder = tmp_path_factory.mktemp("quantized") / request.param
    config = CalibrationConfig(calib=str(text_file), windows=4, window_length=32, gptq=False, device="cpu")
    quantize_model(model_dir, get_scheme(request.param), folder, config)
    return load(str(folder), device="cpu")


@pytest.mark.parametrize("batch_size", [3, 12])
def test_batch_size_changes_nothing(quantized: Loaded, text_file: Path, batch_size: int) -> None:
    text = load_text(str(text_file))
    measure = [
        measure_perplexity(quantized.model, quantized.tokenizer, text, window=WINDOW, limit=12, batch_size=size)
        for size in (1, batch_size)
    ]
    assert measure[1].perplexity == pytest.approx(measure[0].perplexity, rel=1e-3)


def test_requests_in_padded_batches(quantized: Loaded) -> None:
    pytest.importorskip("lm_eval")
    from atom.eval.lm import AtomLM

    encode = quantized.tokenizer.encode
    pairs = [("The quick brown fox", " jumps over the lazy dog."), ("x", "y"), ("Question: what is two", " plus two?")]
    requests = [(None, encode(context), encode(continuation)) for context, continuation in pairs]
    alone, together = (
        AtomLM(quantized, batch_size=size)._loglikelihood_tokens(requests, disable_tqdm=True) for size in (1, 3)
    )
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-3)


def test_the_quantized_path_is_what_is_measured(quantized: Loaded, text_file: Path) -> None:
    """Against a loop that gives the model its scheme's cache; a full-precision cache makes another number."""
    text = load_text(str(text_file))
    model = quantized.model
    tokens = make_windows(quantized.tokenizer, text, WINDOW, limit=3).tokens
    assert model.scheme is not None and model.scheme.kv is not None

    def by_hand(scheme: Scheme | None) -> float:
        losses = []
        for row in tokens:
            kv = DenseKV.for_scheme(model.config, scheme)
            with torch.no_grad():
                logits = model.logits(model(row, kv.positions(WINDOW), kv))
            losses.append(F.cross_entropy(logits[:-1], row[1:]).item())
        return sum(losses) / len(losses)

    found = measure_perplexity(model, quantized.tokenizer, text, window=WINDOW, limit=3).nll
    assert found == pytest.approx(by_hand(model.scheme), rel=1e-5)
    assert found != pytest.approx(by_hand(None), rel=1e-5)


def test_result_of_a_quantized_model(quantized: Loaded, model_dir: Path, text_file: Path) -> None:
    options = {"ppl": (str(text_file),), "window": WINDOW, "limit": 6, "device": "cpu"}
    result = evaluate(EvalConfig(quantized.name, kl_to=str(model_dir), **options))  # type: ignore[arg-type]
    baseline = evaluate(EvalConfig(str(model_dir), **options))  # type: ignore[arg-type]
    assert (result.scheme_name, result.path) == (Path(quantized.name).name, "reference")
    (found,), (row,) = result.perplexity, compare(baseline, result)
    assert found.kl is not None and found.kl > 1e-5 and found.reference == str(model_dir)
    assert row.is_paired and row.a == baseline.perplexity[0].perplexity and row.b == found.perplexity
    if result.scheme_name == "w8a8":  # four bits of a random model are noise
        assert found.kl < 0.2 and row.recovery == pytest.approx(100, abs=5)
