"""A step's time by kernel: what each adds, gaps, and where steps begin."""

import pytest

from benchmarks.timeline import Span, idle_median, idle_share, lines_of, spans_of, split_steps, table


def test_what_a_kernel_adds_ends_with_it() -> None:
    """b begins while a runs, c after a gap, and a short one within c adds nothing."""
    step = [Span("a", 0, 10), Span("b", 8, 4), Span("c", 13, 5), Span("d", 14, 1)]
    found = {line.name: line for line in lines_of(step)}
    assert [found[name].adds for name in "abcd"] == [10, 2, 6, 0]
    assert [found[name].gap for name in "abcd"] == [0, 0, 1, 0]
    assert sum(line.adds for line in lines_of(step)) == 18
    assert "one step" in table([step, step, step])
    assert idle_share([step]) == 1 / 18
    later = [Span("a", 20, 18), Span("b", 38, 2)]  # two of 22 stand still before it
    after_a_pause = [Span("a", 70, 10)]
    assert idle_median([step, later]) == 2 / 22 and idle_share([later, after_a_pause]) == 30 / 60
    assert idle_median([step, later, after_a_pause, [Span("a", 80, 5)]]) == 2 / 22


def test_steps_begin_at_what_runs_once_in_each() -> None:
    spans = [Span(name, at, 1) for at, name in enumerate("xmabbmabbmab")]
    steps = split_steps(spans, 3)
    assert ["".join(span.name for span in step) for step in steps] == ["mabb", "mabb"]
    with pytest.raises(ValueError, match="no kernel runs 7 times"):
        split_steps(spans, 7)


def test_spans_are_the_gpus_work_in_order() -> None:
    events = [
        {"cat": "kernel", "name": "late", "ts": 5.0, "dur": 1.0},
        {"cat": "cpu_op", "name": "host", "ts": 0.0, "dur": 9.0},
        {"cat": "gpu_memcpy", "name": "copy", "ts": 1.0, "dur": 2.0},
        {"name": "process_name", "ph": "M"},
    ]
    assert [span.name for span in spans_of(events)] == ["copy", "late"]
