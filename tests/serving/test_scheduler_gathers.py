"""Prompts that come one by one beside a crowd that decodes are gathered, within limits."""

import pytest

from .fake_runner import FakeEngine
from .one_scheduler import engine, request


def admissions(run: FakeEngine, steps: int) -> list[int]:
    """The places, among that many steps, of those that begin a prompt."""
    found = []
    for place in range(steps):
        step = run.launch()
        assert step is not None
        found += [place] * bool(step.admitted)
        run.deliver()
    return found


def test_prompts_that_come_one_by_one_share_steps() -> None:
    """Two decode and one comes every step: at most every fourth step begins some, and none is lost."""
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=4)
    for name in "ab":
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    found = []
    for place, name in enumerate("cdefghij"):
        run.add(request(name, length=2, max_tokens=30))
        found += [place + at for at in admissions(run, 1)]
    assert found == [3, 7], "the fourth step after the last one that began any"
    run.finish()
    assert len(run.outputs) == 10
    run.assert_idle()


def test_short_prompts_are_not_gathered() -> None:
    """Those that fit into a few tokens begin at once, up to the first that does not; that one waits for its turn."""
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=4, admission_few=5)
    for name in "ab":
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    for name, length in (("c", 2), ("d", 3), ("e", 2), ("f", 6), ("g", 1)):
        run.add(request(name, length=length, max_tokens=30))
    steps = [run.launch() for _ in range(7)]
    assert [[s.request.request_id for s in step.admitted] for step in steps if step is not None] == [
        ["c", "d"], ["e"], [], [], [], ["f", "g"], [],
    ]  # fmt: skip
    while run.results:
        run.deliver()
    run.finish()
    run.assert_idle()


@pytest.mark.parametrize(("decodes", "length"), [(1, 2), (2, 16)], ids=["no crowd", "enough to begin"])
def test_prompts_are_not_made_to_wait_without_need(decodes: int, length: int) -> None:
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=8)
    for name in "ab"[:decodes]:
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    run.add(request("c", length=length, max_tokens=30))
    assert admissions(run, 1) == [0]
    run.finish()


@pytest.mark.parametrize(
    ("limits", "length", "admitted"),
    [
        ({"max_num_seqs": 3}, 10, [3]),
        ({"max_num_seqs": 3}, 16, [0]),
        ({"num_blocks": 7}, 10, [3]),
        ({"num_blocks": 8}, 10, [0]),
    ],
    ids=["one lane, not enough", "one lane, enough", "blocks for one", "blocks for two"],
)
def test_only_what_could_begin_is_enough_to_begin(limits: dict[str, int], length: int, admitted: list[int]) -> None:
    """Two of one block decode and two wait; a step has enough of 16 tokens."""
    known = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "watermark": 0.0, "admission_crowd": 2}
    run = engine(**{**known, **limits}, admission_interval=4)
    for name in "ab":
        run.add(request(name, length=1, max_tokens=8))
    assert admissions(run, 1) == [0]
    for name in "cd":
        run.add(request(name, length=length, max_tokens=2))
    assert admissions(run, 4)[:1] == admitted
    run.finish()
    run.assert_idle()
