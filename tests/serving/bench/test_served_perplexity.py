"""Perplexity over HTTP is `atom eval`'s, and stands in the result and the report of a load."""

from collections.abc import Callable
from pathlib import Path

import pytest

from atom.eval.perplexity import measure_perplexity
from atom.eval.texts import load_text
from atom.models.loader import load_model, load_tokenizer
from atom.serving.bench.config import ServeBenchConfig
from atom.serving.bench.report import write_report
from atom.serving.bench.report_data import read_bench
from atom.serving.bench.serve import bench_serve
from atom.serving.bench.served_perplexity import cut_windows
from atom.serving.engine_config import EngineConfig
from atom.serving.process import make_service
from atom.serving.server import build_app
from atom.serving.server_config import ServerConfig
from atom.serving.startup import start_up

from ..scripted import serve_app


def test_it_is_what_evaluation_finds(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    path = tiny("llama")
    engine = EngineConfig(device="cpu", kv_cache_bytes="16MiB", max_num_seqs=8, max_num_batched_tokens=64)
    service = make_service(str(path), start_up(str(path), engine), engine, ServerConfig(served_model_name=("m",)))
    options = {"ppl": text_file, "ppl_window": 48, "ppl_windows": 5, "tokenizer": str(path)}
    with serve_app(build_app(service)) as url:
        result = bench_serve(ServeBenchConfig(url, "10/4", 4, 2, output=tmp_path / "load.json", **options))  # type: ignore[arg-type]
    wanted = measure_perplexity(load_model(path), load_tokenizer(path), load_text(str(text_file)), window=48, limit=5)
    found = result.server["perplexity"]
    assert found["nll"] == pytest.approx(wanted.nll, abs=1e-4)
    assert (found["windows"], found["tokens"], found["text"]) == (5, wanted.tokens, wanted.text)
    assert f"perplexity   {wanted.perplexity:.3f} of" in result.table() and result.config["ppl"] == text_file.name
    result.write(tmp_path / "load.json")
    markdown, *_ = write_report(read_bench([tmp_path / "load.json"]), tmp_path / "report", "x", plots=False)
    assert f"{wanted.perplexity:,.2f}" in markdown.read_text() or f"{wanted.perplexity:,.3f}" in markdown.read_text()


def test_what_cannot_be_scored_is_said(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has 5 tokens and a window 48"):
        cut_windows(load_tokenizer(tiny("llama")), "abcde", 48, 3)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        ServeBenchConfig(ppl=Path("x.txt"), token_ids="1:9")
