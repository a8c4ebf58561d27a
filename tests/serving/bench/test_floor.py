"""Bounds against hand arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.kernels.bounds import GPUS
from atom.models.family import model_config
from atom.quant.presets import get_scheme
from atom.serving.bench.bounds import BoundsConfig, bound_rows, bounds_table, goal_rows, goals_table
from atom.serving.bench.floor import GIB, Mix, ModelFloor, model_floor
from atom.serving.bench.goals import GOALS, Case, Goal, paper_case
from atom.serving.bench.lengths import parse_workload
from atom.serving.bench.shapes import SHAPES, read_shape, shape_config
from atom.serving.kv_pool import bytes_per_block

H200 = GPUS["h200"]
BANDWIDTH, RATE_16, RATE_8 = 4.38e12, 900e12, 1656e12

# Llama-2-7B: 32 layers of 4 x 4096^2 (attention) + 3 x 4096 x 11008 (MLP), and their norms.
LAYER_7B = 4 * 4096**2 + 3 * 4096 * 11008
PARAMETERS_7B = 32 * (LAYER_7B + 2 * 4096) + 2 * 32000 * 4096 + 4096


def mix(workload: str, count: int = 4) -> Mix:
    return Mix.of(parse_workload(workload).items(count, 0))


def test_weights_and_cache_of_llama_2_7b() -> None:
    full = model_floor("llama-2-7b", "bf16", H200)
    assert PARAMETERS_7B == 6_738_415_616, "as published"
    assert full.weight_bytes == 2 * PARAMETERS_7B
    assert full.kv_token_bytes == 2 * 32 * 4096 * 2 == 524_288
    eight, four = model_floor("llama-2-7b", "w8a8", H200), model_floor("llama-2-7b", "w4a8", H200)
    rows = 4 * 4096 + 2 * 11008 + 4096  # with a 32-bit scale each
    centre = 4 * 4096  # of a layer's keys
    assert eight.weight_bytes == 32 * (LAYER_7B + 4 * rows + centre) + 2 * (PARAMETERS_7B - 32 * LAYER_7B)
    assert four.kv_token_bytes == 2 * 32 * 32 * (128 / 2 + 4) == 139_264, "4 bits, and scale and zero point a head"


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "fp8", "w4a8", "w4a4"])
def test_the_cache_is_the_engine_s(scheme: str) -> None:
    """What the pool really takes for a token; FP8's blocks hold some filling beside their scales."""
    for shape in ("llama-2-7b", "llama-3-8b"):
        floor = model_floor(shape, scheme, H200)
        real = bytes_per_block(floor.config, floor.scheme, torch.bfloat16, 16) / 16
        assert real == pytest.approx(floor.kv_token_bytes, rel=0.02 if scheme == "fp8" else 0)


def test_reserved_memory_is_nobody_s() -> None:
    case = paper_case(100.0)
    less = replace(case, reserve_gb=4.0)
    assert less.bound("bf16", H200) == replace(case, memory_gb=20).bound("bf16", H200)


def test_step_bytes_and_largest_batch_by_hand() -> None:
    full = model_floor("llama-2-7b", "bf16", H200)
    embedding = 32000 * 4096 * 2
    assert full.step_bytes(32, 700) == 2 * PARAMETERS_7B - embedding + 32 * 8192 + 32 * 700 * 524_288
    room = 24 * GIB - 2 * PARAMETERS_7B
    assert full.max_batch(24 * GIB, 700) == int(room / ((700 + 7.5) * 524_288)) == 33
    assert full.max_batch(13e9, 700) == 0
    four = model_floor("llama-2-7b", "w4a4", H200)
    assert four.max_batch(24 * GIB, 700) == int((24 * GIB - four.weight_bytes) / (707.5 * 139_264)) == 221


def test_decode_step_of_one_sequence_is_its_bytes() -> None:
    """At batch 1 every product is bound by its weights, so the step is all bytes over the bandwidth."""
    full = model_floor("llama-2-7b", "bf16", H200)
    inputs_outputs = 32 * 2 * ((4096 + 12288) + (4096 + 4096) + (4096 + 22016) + (11008 + 4096)) + 2 * (4096 + 32000)
    weights = 2 * (32 * LAYER_7B + 32000 * 4096)
    attention = 32 * (1001 * 16384 + 2 * 4096 * 2)
    assert full.step_us(1, 1000) == pytest.approx(1e6 * (weights + inputs_outputs + attention) / BANDWIDTH, rel=1e-9)
    assert full.step_us(1, 0) == pytest.approx(3024, rel=0.01), "13.2 GB at 4.38 TB/s"


def test_large_batches_are_bound_by_operations() -> None:
    M = 4096
    for scheme, rate in (("bf16", RATE_16), ("w8a8", RATE_8), ("w4a8", RATE_8), ("w4a16", RATE_16)):
        floor = model_floor("llama-2-7b", scheme, H200)
        layers = 1e6 * 2 * M * 32 * LAYER_7B / rate
        head = 1e6 * 2 * M * 32000 * 4096 / RATE_16
        assert floor.linear_us(M, M) == pytest.approx(layers + head, rel=1e-9)


def test_prefill_by_hand() -> None:
    floor = model_floor("llama-2-7b", "bf16", H200)
    prompt = 1000
    products = 2 * prompt * 32 * LAYER_7B / RATE_16
    attention = 32 * 4 * 4096 * prompt * (prompt + 1) / 2 / RATE_16
    head = 2 * 32000 * 4096 / RATE_16
    assert floor.prefill_us(np.array([1000.0])) == pytest.approx(1e6 * (products + attention + head), rel=1e-9)
    assert floor.prefill_us(np.array([1000.0] * 3)) == pytest.approx(3e6 * (products + attention + head), rel=1e-9)


def test_sliding_windows_read_less() -> None:
    raw: dict[str, Any] = {**SHAPES["tiny"], "architectures": ["MistralForCausalLM"], "sliding_window": 100}
    slides = ModelFloor(model_config(raw), get_scheme("bf16"), H200)
    plain = model_floor("tiny", "bf16", H200)
    assert slides.attention_us(4, 100) == plain.attention_us(4, 100)
    assert slides.attention_us(4, 5000) == slides.attention_us(4, 100)
    width, layers = 192, 2
    pairs = layers * (100 * 101 / 2 + 400 * 100)
    difference = slides.prefill_us(np.array([500.0])) - slides._prefill_token_us * 500
    assert difference == pytest.approx(1e6 * (4 * width * pairs + 2 * 258 * 192) / RATE_16)


def test_bound_of_a_steady_state() -> None:
    """Fixed lengths: each token costs a share of a step, and its share of one prefill."""
    floor, load = model_floor("llama-3-8b", "fp8", H200), mix("512/256")
    assert load.context == 512 + 128
    found = floor.bound(load, 64)
    step, prefill = floor.step_us(64, 640), floor.prefill_us(np.array([512.0]))
    assert found.step_ms == pytest.approx(step / 1e3)
    assert found.tpot_ms == pytest.approx((step + 64 * prefill / 255) / 1e3)
    assert found.out_tok_s == pytest.approx(256e6 / (255 * step / 64 + prefill))
    alone = floor.bound(mix("512/1"), 64)
    assert alone.out_tok_s == pytest.approx(1e6 / prefill), "outputs of one token: prefill alone"


def test_best_batch_meets_memory_and_target() -> None:
    floor, load = model_floor("llama-2-7b", "bf16", H200), mix("paper", 500)
    by_memory = floor.best(load, 24 * GIB, 100)
    assert by_memory is not None and by_memory.batch == floor.max_batch(24 * GIB, load.context)
    by_target = floor.best(load, 24 * GIB, 5)
    assert by_target is not None and by_target.batch < by_memory.batch and by_target.tpot_ms <= 5
    assert floor.bound(load, by_target.batch + 1).tpot_ms > 5
    assert floor.best(load, 24 * GIB, 1) is None and floor.best(load, 13e9, 100) is None


def test_goals_and_rows() -> None:
    case = paper_case(100.0)
    bound, base = case.bound("w4a4", H200), case.bound("bf16", H200)
    assert bound is not None and base is not None
    goal = Goal(case, "w4a4", 7.73, "bf16")
    assert goal.allowed(H200) == pytest.approx(bound.out_tok_s / base.out_tok_s)
    assert Goal(case, "w4a4", 1).allowed(H200) == bound.out_tok_s
    rows = [case.row(scheme, H200) for scheme in ("w4a4", "bf16")]
    assert rows[0]["input"] == 24 and rows[0]["kv"] == "int4" and rows[0]["scheme"] == "w4a4"
    assert goal.measured([]) is None
    found = [{**rows[0], "out_tok_s": 700.0}, {**rows[1], "out_tok_s": 100.0}]
    assert goal.measured(found) == 7.0
    assert goal.measured([{**rows[0], "workload": "sharegpt"}, rows[1]]) is None, "another distribution's row"
    equal = Case("paper", "llama-2-7b", "paper:2048", 24, None, 128)
    assert equal.bound("bf16", H200) is None and equal.bound("w4a4", H200) is not None


def test_tables() -> None:
    config = BoundsConfig(shape="llama-2-7b", schemes=("bf16", "w4a4"), batches=(8, 128), tpot_ms=(100.0,))
    first = config.cases()[0].row("w4a4", H200)
    measured = [{**first, "out_tok_s": first["out_tok_s"] / 2}]
    rows = bound_rows(config, measured)
    assert [row["batch_mode"] for row in rows] == ["best", "best", "equal", "equal", "equal", "equal"]
    assert rows[1]["share"] == pytest.approx(0.5, abs=0.001) and rows[0]["share"] is None and rows[1]["ratio"] > 5
    text = bounds_table(rows)
    assert "24 GiB" in text and "equal batch" in text and "does not fit" not in text
    small = BoundsConfig(schemes=("bf16",), memory_gb=(12,), batches=())
    assert "no batch" in bounds_table(bound_rows(small, []))
    goals = goals_table(goal_rows("h200", []))
    assert "w4a4 over bf16" in goals and "20,000" in goals


def test_shapes(tmp_path: Path) -> None:
    for name in SHAPES:
        assert shape_config(name).num_layers > 0
    for file in (tmp_path / "somewhere" / "config.json", tmp_path / "somewhere.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(SHAPES["llama-3-8b"]))
        assert read_shape(str(file)) == ("somewhere", SHAPES["llama-3-8b"])
    with pytest.raises(ValueError, match="no shape 'llama-9'; use one of tiny, llama-2-7b"):
        read_shape("llama-9")
    with pytest.raises(ValueError, match="unknown --gpu 'tpu'"):
        BoundsConfig(gpu="tpu")


def test_what_docs_benchmarks_says_of_the_goals() -> None:
    ratios = [goal.allowed(H200) for goal in GOALS if goal.case.experiment == "paper"]
    assert [None if r is None else round(r, 1) for r in ratios] == [5.8, 3.8, 2.0, 7.0, 4.0, 2.1], "mend the page"
