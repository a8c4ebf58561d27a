"""Results survive a round trip; recovery and its intervals against simulation and hand computation."""

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path

import pytest

from atom.eval.compare import average_recovery, compare, compare_average, compare_table, recovery_table
from atom.eval.perplexity import Perplexity
from atom.eval.results import EvalResult, Metric, TaskResult


def perplexity(nll: list[float], text: str = "wiki", window: int = 8) -> Perplexity:
    mean = statistics.fmean(nll)
    rest = {"source": "s", "sha256": "0", "bos": "none", "left_out": 0, "tokenizer": "T/9", "seconds": 1.0}
    sizes = {"tokens": 7 * len(nll), "windows": len(nll), "window": window}
    return Perplexity(text, perplexity=math.exp(mean), nll=mean, nll_stderr=0.1, window_nll=tuple(nll), **rest, **sizes)  # type: ignore[arg-type]


def task(values: list[float], name: str = "piqa", fingerprint: str | None = "f") -> TaskResult:
    mean = statistics.fmean(values)
    stderr = statistics.stdev(values) / math.sqrt(len(values))
    metrics = {"acc": Metric(0.5, 0.1, True), "acc_norm": Metric(mean, stderr, True, tuple(values))}
    return TaskResult(name, "1.0", 0, len(values), fingerprint, metrics)


def result(*parts: Perplexity | TaskResult, scheme: str | None = None) -> EvalResult:
    return EvalResult(
        model=f"model-{scheme or 'fp'}",
        scheme=None if scheme is None else {"name": scheme},
        path="reference",
        device="cpu",
        dtype="float32",
        seed=1234,
        date="2026-01-01",
        commit="abc",
        command="atom eval",
        machine={},
        versions={},
        config={},
        seconds=1.0,
        perplexity=tuple(part for part in parts if isinstance(part, Perplexity)),
        tasks=tuple(part for part in parts if isinstance(part, TaskResult)),
    )


def test_round_trip(tmp_path: Path) -> None:
    written = result(perplexity([1.0, 2.0]), task([1.0, 0.0, 1.0]), scheme="w4a4")
    path = tmp_path / "deep" / "a.json"
    written.write(path)
    assert EvalResult.read(path) == written
    assert json.loads(path.read_text())["kind"] == "atom-eval"
    assert "piqa" in written.table() and "w4a4" in written.table()
    assert written.summary()["tasks"]["piqa"]["acc_norm"]["value"] == pytest.approx(2 / 3)


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"atom eval MODEL --output .*a.json writes it"):
        EvalResult.read(path)
    for text, message in [
        ("{", "is not a complete evaluation"),
        ('{"kind": "other"}', "this JSON is no evaluation"),
        ('{"kind": "atom-eval", "version": 9}', "has version 9, this Atom reads 1; update Atom"),
        ('{"kind": "atom-eval", "version": 1}', "is not a complete evaluation"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            EvalResult.read(path)


def test_perplexity_recovery_is_paired() -> None:
    a, b = [1.0, 3.0, 2.0], [1.1, 3.1, 2.2]
    row = compare(result(perplexity(a)), result(perplexity(b)))[0]
    assert row.recovery == pytest.approx(100 * math.exp(2.0 - 6.4 / 3))
    half = 1.959964 * statistics.stdev([0.1, 0.1, 0.2]) / math.sqrt(3)
    assert row.high == pytest.approx(row.recovery * math.exp(half)) and row.is_paired


@pytest.mark.parametrize("is_paired", [True, False])
def test_interval_covers_the_truth(is_paired: bool) -> None:
    """Of 95 % intervals over simulated tasks, about 95 % hold the true recovery; pairing makes them narrower."""
    rng, hits, widths = random.Random(0), 0, []
    for _ in range(400):
        a = [float(rng.random() < 0.7) for _ in range(300)]
        b = [x if rng.random() < 0.9 else float(rng.random() < 0.5) for x in a]  # true mean 0.9 * 0.7 + 0.1 * 0.5
        row = compare(result(task(a)), result(task(b, fingerprint="f" if is_paired else "g")))[0]
        assert row.low is not None and row.high is not None and row.is_paired == is_paired
        hits += row.low <= 100 * 0.68 / 0.7 <= row.high
        widths.append(row.high - row.low)
    if is_paired:
        assert 0.92 <= hits / 400 <= 0.98
        assert statistics.fmean(widths) < 8
    else:
        assert hits / 400 > 0.98 and statistics.fmean(widths) > 12


def test_a_zero_baseline_and_lower_is_better() -> None:
    zero, some = result(task([0.0, 0.0])), result(task([1.0, 0.0]))
    row = compare(zero, some)[0]
    assert row.recovery is None and "undefined" in compare_table(zero, some, [row])
    lower = {"word_perplexity": Metric(20.0, None, False)}
    higher = {"word_perplexity": Metric(25.0, None, False)}
    a, b = (result(dataclasses.replace(task([1.0, 0.0], "wikitext"), metrics=m)) for m in (lower, higher))
    row = compare(a, b)[0]
    assert (row.a, row.b, row.recovery, row.low) == (20.0, 25.0, 80.0, None)


def test_table_and_mean() -> None:
    a = result(perplexity([1.0, 2.0]), task([1.0, 1.0, 0.0, 1.0]), task([1.0, 0.0, 1.0, 1.0], "boolq"))
    b = result(perplexity([1.0, 2.1]), task([1.0, 0.0, 0.0, 1.0]), task([1.0, 0.0, 1.0, 1.0], "boolq"), scheme="w4a4")
    rows = compare(a, b)
    assert [row.measure for row in rows] == ["ppl wiki", "piqa acc_norm", "boolq acc", "mean of 2 tasks"]
    mean = rows[-1]
    assert (mean.a, mean.b, mean.is_paired) == (0.625, 0.5, True) and mean.recovery == pytest.approx(80.0)
    assert mean.low is None  # boolq's acc has no values of documents here
    full, low = ([task(values, name) for name in ("piqa", "arc_easy")] for values in ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0]))
    known = compare_average(result(*full), result(*low))
    assert known is not None and known.recovery == pytest.approx(50.0)
    assert known.low is not None and known.high is not None and known.low < 50 < known.high
    assert compare_average(a, result(task([1.0, 0.0, 0.0, 1.0]))) is None  # of one task
    drawn = compare_table(a, b, rows)
    assert "mean of 2 tasks" in drawn and "B: model-w4a4 (w4a4, reference)" in drawn


def test_several_are_columns_of_one_table() -> None:
    a = result(perplexity([1.0, 2.0]), task([1.0, 1.0, 0.0, 1.0]))
    b = result(perplexity([1.0, 2.1]), scheme="w4a4")
    c = result(perplexity([1.0, 2.0]), task([1.0, 1.0, 0.0, 1.0]), scheme="w8a8")
    mixed = dataclasses.replace(c, scheme={"name": "w4a4-hadamard", "overrides": [{}]})
    drawn = recovery_table(a, [(b, compare(a, b)), (c, compare(a, c)), (mixed, compare(a, mixed))])
    text, piqa = drawn.splitlines()[-2:]
    assert "D: model-w8a8 (w4a4-hadamard, formats by place, reference)" in drawn
    assert text.split()[:4] == ["ppl", "wiki", "4.4817", "95.12"] and text.count("100.00 %") == 2
    assert piqa.split()[:3] == ["piqa", "acc_norm", "0.7500"] and piqa.count("100.00 %") == 2


def test_unlike_protocols_are_refused() -> None:
    a = result(perplexity([1.0, 2.0]), task([1.0, 0.0]))
    with pytest.raises(ValueError, match="text wiki: window is 8 in the first evaluation, 16 in the second"):
        compare(a, result(perplexity([1.0, 2.0], window=16)))
    with pytest.raises(ValueError, match="task piqa: samples is 2 in the first evaluation, 3 in the second"):
        compare(a, result(task([1.0, 0.0, 1.0])))
    with pytest.raises(ValueError, match="have no text or task in common"):
        compare(a, result(perplexity([1.0], text="c4")))


def test_recovery_of_the_mean_over_tasks() -> None:
    def result(task: str, values: tuple[float, ...]) -> TaskResult:
        metric = Metric(sum(values) / len(values), None, True, values)
        return TaskResult(task, "1", 0, len(values), task, {"acc": metric})

    full = [result("piqa", (1.0, 1.0, 0.0, 0.0)), result("boolq", (1.0, 1.0))]
    found = [result("piqa", (1.0, 0.0, 0.0, 0.0)), result("boolq", (1.0, 1.0))]
    recovery, half = average_recovery(full, found)
    ratio = (0.25 + 1.0) / (0.5 + 1.0)
    assert recovery == pytest.approx(100 * ratio)
    residuals = [1 - ratio, 0 - ratio, 0.0, 0.0]
    variance = statistics.variance(residuals) / 4 / 4  # of boolq, whose answers all agree, none
    assert half == pytest.approx(100 * 1.959964 * math.sqrt(variance) / 0.75)
    with pytest.raises(ValueError, match="same documents"):
        average_recovery(full, found[:1])
