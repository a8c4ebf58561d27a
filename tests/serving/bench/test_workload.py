"""Length distributions, traces and arrivals: statistics against their definitions, samples of every trace format."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from atom.serving.bench.arrivals import Arrivals
from atom.serving.bench.lengths import parse_workload
from atom.serving.bench.traces import Trace, read_trace
from atom.serving.bench.workload import Segment, WorkItem, drop_long, mean_context


def lengths(name: str, count: int = 4000, seed: int = 0) -> np.ndarray:
    """[count, 2]: prompt and output tokens."""
    return np.array([(i.prompt_tokens, i.output_tokens) for i in parse_workload(name).items(count, seed)])


def test_fixed_and_uniform() -> None:
    assert (lengths("512/256", 5) == [512, 256]).all()
    drawn = lengths("uniform:100-200/1-3")
    assert drawn.min(0).tolist() == [100, 1] and drawn.max(0).tolist() == [200, 3], "ends included"
    assert drawn.mean(0) == pytest.approx([150, 2], rel=0.02)


def test_paper_is_the_paper_s() -> None:
    """Prompts: scipy's lognorm(s=0.8, loc=-1, scale=18); totals: uniform to 2048, but prompt + 2 at least."""
    drawn = lengths("paper")
    totals = drawn.sum(1)
    assert drawn[:, 1].min() >= 2 and drawn[:, 0].min() >= 1 and totals.max() <= 2047
    assert np.median(drawn[:, 0]) == pytest.approx(18 - 1, abs=1.0)
    exact_mean = 18 * math.exp(0.8**2 / 2) - 1
    assert drawn[:, 0].mean() == pytest.approx(exact_mean - 0.5, rel=0.05), "cut to integers"
    assert totals.mean() == pytest.approx(1024, rel=0.03)
    assert np.percentile(totals, [25, 75]) == pytest.approx([512, 1536], rel=0.05)
    assert lengths("paper:256").sum(1).max() <= 255


def test_lognormal_and_sharegpt() -> None:
    drawn = lengths("lognormal:40,0.5/200,0.25")
    assert np.median(drawn, axis=0) == pytest.approx([40, 200], rel=0.05)
    assert np.log(drawn).std(0) == pytest.approx([0.5, 0.25], rel=0.06)
    drawn = lengths("sharegpt")
    assert drawn.min() >= 4 and drawn[:, 0].max() <= 1024 and drawn.sum(1).max() <= 2048
    assert np.median(drawn, axis=0) == pytest.approx([35, 245], rel=0.1), "the trace's medians are 25 and 278"


def test_seeds() -> None:
    assert (lengths("paper", 50, seed=1) == lengths("paper", 50, seed=1)).all()
    assert (lengths("paper", 50, seed=1) != lengths("paper", 50, seed=2)).any()
    assert (lengths("paper", 50) == lengths("paper", 100)[:50]).all(), "more requests begin with the same ones"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512", "cannot read workload '512'; the forms are PROMPT/OUTPUT"),
        ("0/5", "has a length below 1"),
        ("uniform:9-3/1-2", "end is below its start"),
        ("paper:3", "leaves no room"),
        ("burst", "cannot read workload"),
    ],
)
def test_workloads_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_workload(text)


def test_a_distribution_has_no_end() -> None:
    with pytest.raises(ValueError, match="has no end; say how many requests with --num-requests"):
        parse_workload("paper").items(None, 0)


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


AZURE = "arrival_s,context_tokens,generated_tokens\n2.5,374,44\n6.5,396,109\n7.0,0,9\n"
PUBLISHED = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
MOONCAKE = [
    {"timestamp": 4000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 8]},
    {"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]},
]
SHAREGPT = [{"id": "a_0", "turns": [[16, 181], [8, 444], [0, 5]]}, {"id": "b_0", "turns": [[0, 9]]}]
ARXIV = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n3858,133,3991,29.0\n"


def json_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def shape(trace: Trace) -> list[tuple[int, int, float | None]]:
    return [(r.prompt_tokens, r.output_tokens, r.arrival_s) for r in trace.requests]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_azure(tmp_path: Path, ending: str) -> None:
    trace = read_trace(write(tmp_path / f"conv.csv{ending}", AZURE))
    assert (trace.name, trace.format, trace.skipped) == ("trace:azure-conv", "azure", 1)
    assert shape(trace) == [(374, 44, 0.0), (396, 109, 4.0)]
    assert trace.has_arrivals and parse_workload(f"trace:{tmp_path}/conv.csv{ending}") == trace
    published = read_trace(write(tmp_path / "azure.csv", PUBLISHED))
    assert [r.arrival_s for r in published.requests] == pytest.approx([0, 4.314579], abs=1e-5)


def test_mooncake_shares_prefixes(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "conversation.jsonl", json_lines(MOONCAKE)))
    assert shape(trace) == [(600, 3, 0.0), (1100, 5, 3.0)], "in order of arrival, from zero"
    short, long = (r.segments for r in trace.requests)
    assert short == (Segment("block 0", 512), Segment("block 7", 88))
    assert long == (Segment("block 0", 512), Segment("block 7", 512), Segment("block 8", 76))


def test_sharegpt_first_turns_and_all(tmp_path: Path) -> None:
    path = write(tmp_path / "lengths.jsonl", json_lines(SHAREGPT))
    first = read_trace(path)
    assert shape(first) == [(16, 181, None)] and first.skipped == 1 and not first.has_arrivals
    turns = parse_workload(f"turns:{path}")
    assert isinstance(turns, Trace)
    assert shape(turns) == [(16, 181, None), (205, 444, None), (649, 5, None)] and turns.skipped == 1
    assert turns.requests[2].segments[:3] == turns.requests[1].segments, "a turn begins with the one before"


def test_arxiv(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "lengths.csv", ARXIV))
    assert trace.name == "trace:arxiv-lengths" and shape(trace) == [(3772, 54, None), (3858, 133, None)]
    assert len(trace.items(1, 0)) == 1
    with pytest.raises(ValueError, match="has 2 requests, 3 were asked for"):
        trace.items(3, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "a,b,c\n1,2,3\n", "begins with 'a,b,c', which no trace format does; known are azure"),
        ("x.csv", AZURE + "8.0,many,4\n", "request 4 does not read as azure"),
        ("x.jsonl", json_lines(MOONCAKE) + '{"timestamp": 1}\n', "request 3 does not read as mooncake"),
        ("x.jsonl", json_lines([{**MOONCAKE[0], "input_length": 1600}]), "3 blocks of 512 tokens for 1600 tokens"),
        ("x.csv", AZURE.splitlines()[0] + "\n1.0,0,4\n", "no request with a prompt and an output"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / name, text))


def test_turns_need_conversations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only sharegpt has turns; use trace:conv\.csv"):
        parse_workload(f"turns:{write(tmp_path / 'conv.csv', AZURE)}")


def test_poisson_and_gamma_gaps() -> None:
    work = parse_workload("1/1").items(8000, 0)
    for burstiness in (1.0, 0.25, 4.0):
        times = Arrivals(rate=20, burstiness=burstiness).times(work, seed=5)
        assert times is not None
        gaps = np.diff([0.0, *times])
        assert gaps.min() >= 0
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.06)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.06)
    assert Arrivals().times(work, 0) is None and Arrivals().is_closed
    assert [Arrivals(rate=1).kind, Arrivals(rate=1, burstiness=2).kind] == ["poisson", "gamma"]


def test_trace_times(tmp_path: Path) -> None:
    work = read_trace(write(tmp_path / "conv.csv", AZURE)).items(None, 0)
    assert Arrivals(from_trace=True, speed=2).times(work, 0) == [0.0, 2.0]
    with pytest.raises(ValueError, match="records no arrival times"):
        Arrivals(from_trace=True).times(parse_workload("1/1").items(2, 0), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0"),
        ({"burstiness": 0.0}, "burstiness must be above 0"),
        ({"max_concurrency": 0}, "at least 1"),
        ({"speed": 2.0}, "scales a trace's own times"),
        ({"rate": 2.0, "from_trace": True}, "not both"),
    ],
)
def test_arrivals_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrivals(**options)  # type: ignore[arg-type]


def item(prompt: int, output: int) -> WorkItem:
    return WorkItem((Segment("a", prompt),), output)


def test_mean_context_by_hand() -> None:
    """Prompt 10, output 3: two decode steps over 11 and 12 tokens. Prompt 100, output 2: one over 101."""
    assert mean_context([item(10, 3)]) == 11.5
    assert mean_context([item(10, 3), item(100, 2)]) == pytest.approx((11 + 12 + 101) / 3)
    assert mean_context([item(10, 1)]) == 10


def test_long_items_are_dropped_and_counted() -> None:
    kept, dropped = drop_long([item(10, 5), item(10, 6), item(1, 1)], 15)
    assert [i.total_tokens for i in kept] == [15, 2] and dropped == 1
    assert drop_long([item(10, 5)], None) == ([item(10, 5)], 0)
