"""The benchmark of mixed steps: what it loads and asks for is what it times."""

from atom.serving import runner as runner_module
from atom.serving.batch import Step
from atom.serving.engine_config import EngineConfig
from atom.serving.rows import fits_rows
from atom.serving.startup import start_up
from benchmarks.mixed_steps import PAIRS, Loop, way


def test_ways_are_taken_and_left_again() -> None:
    with way("rows"):
        assert runner_module.fits_rows is not fits_rows
    with way("engine"):
        assert runner_module.fits_rows is fits_rows
    assert runner_module.fits_rows is fits_rows


def test_mixed_steps_are_those_asked_for() -> None:
    options = EngineConfig(load_format="dummy", scheme="w4a8", device="cpu", max_num_seqs=4, max_model_len=512)
    ready = start_up("tiny", options)
    seen: list[tuple[int, int]] = []
    launch = ready.runner.launch

    def counted(step: Step):  # type: ignore[no-untyped-def]
        seen.append((step.batch.num_decodes, step.batch.num_tokens))
        return launch(step)

    ready.runner.launch = counted  # type: ignore[method-assign]
    loop = Loop(ready.runner, ready.limits, 3, 32)
    seen.clear()
    assert loop.pairs(1, 5) > 0
    assert seen == [(3, 3), (3, 8)] * PAIRS
    seen.clear()
    assert all(ms > 0 for ms in loop.alone(1, 7))
    assert seen == [(3, 10)] * 5
    loop.end()
    assert not loop.scheduler.has_unfinished
