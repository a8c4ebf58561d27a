"""What becomes of a step's results: of sequences that decode, that guess, that have ended, and of their logprobs."""

from collections.abc import Sequence as SequenceOf

from atom.serving.batch import Step
from atom.serving.config import SchedulerConfig
from atom.serving.news import ended
from atom.serving.request import FinishReason, Request
from atom.serving.result import FAULTY, StepResult, TokenLogprobs
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output

EOS, BLOCK = 9, 4


class Run:
    """A scheduler whose steps' results are written by hand."""

    def __init__(self, *names: str, max_tokens: int = 6, **params: int) -> None:
        self.scheduler = Scheduler(SchedulerConfig(100, 64, 64, BLOCK, max_num_seqs=4, max_num_batched_tokens=64))
        wishes = SamplingParams(max_tokens=max_tokens, temperature=0, **params)  # type: ignore[arg-type]
        for index, name in enumerate(names):
            prompt = tuple(range(10 * (index + 1), 10 * (index + 1) + 3))
            self.scheduler.add(Request(name, prompt, wishes, (EOS,)))

    def schedule(self) -> Step:
        step = self.scheduler.schedule()
        assert step is not None
        return step

    def take(
        self, step: Step, tokens: list[int], logprobs: SequenceOf[TokenLogprobs | None] | None = None
    ) -> dict[str, Output]:
        found = self.scheduler.update(step, StepResult(tokens, None if logprobs is None else list(logprobs)))
        self.scheduler.check()
        assert len({output.request_id for output in found}) == len(found)
        return {output.request_id: output for output in found}


def test_tokens_go_to_their_sequences_and_are_counted() -> None:
    run = Run("a", "b")
    first = run.schedule()
    assert {name: output.token_ids for name, output in run.take(first, [1, 2]).items()} == {"a": (1,), "b": (2,)}
    step = run.schedule()
    assert len(step.decodes) == 2 and not step.rest
    news = run.take(step, [3, 4])
    assert news == {"a": Output("a", 0, (3,)), "b": Output("b", 0, (4,))}
    assert [sequence.token_ids[3:] for sequence in step.decodes.rows.sequences] == [[1, 3], [2, 4]]
    assert run.scheduler.stats().num_output_tokens == 4


def test_one_faulty_one_at_its_end_and_one_that_goes_on() -> None:
    run = Run("a", "b", "c")
    run.take(run.schedule(), [1, 2, 3])
    step, later = run.schedule(), run.schedule()  # the later one is under way when the news come
    news = run.take(step, [FAULTY, EOS, 4])
    assert (news["a"].finish_reason, news["a"].token_ids) == (FinishReason.ERROR, ())
    assert (news["b"].finish_reason, news["b"].token_ids, news["b"].stop_token) == (FinishReason.STOP, (EOS,), EOS)
    assert news["c"] == Output("c", 0, (4,))
    assert run.take(later, [5, 6, 7]) == {"c": Output("c", 0, (7,))}  # nobody waits for the others any more
    assert run.scheduler.stats().num_output_tokens == 6


def test_logprobs_stay_beside_their_tokens() -> None:
    run = Run("a", "b", "c", max_tokens=3)
    run.take(run.schedule(), [1, 2, 3])
    of_a, of_c = TokenLogprobs(4, -0.5), TokenLogprobs(6, -0.25)
    news = run.take(run.schedule(), [4, EOS, 6], [of_a, None, of_c])
    assert (news["a"].logprobs, news["b"].logprobs, news["c"].logprobs) == ((of_a,), None, (of_c,))


def test_full_blocks_are_offered_when_their_steps_are_back() -> None:
    run = Run("a")
    run.take(run.schedule(), [1])
    step, later = run.schedule(), run.schedule()  # the fourth token, which fills the block, and the fifth
    (sequence,) = step.decodes.rows.sequences
    block = run.scheduler.blocks.table(sequence.sequence_id)[0]
    assert not run.scheduler.blocks.is_registered(block)
    run.take(step, [2])
    assert run.scheduler.blocks.is_registered(block) and sequence.computed == BLOCK
    run.take(later, [3])
    assert sequence.registered == 1


def test_a_preempted_sequence_keeps_its_late_token() -> None:
    run = Run("a", "b")
    run.take(run.schedule(), [1, 2])
    step = run.schedule()
    last = step.decodes.rows.sequences[1]
    run.scheduler._preempt(last)
    assert run.take(step, [3, 4])["b"] == Output("b", 0, (4,))
    assert last.token_ids[3:] == [2, 4] and (last.scheduled, last.computed, last.pending) == (0, 0, 0)


def test_news_are_outputs_made_when_they_are_read() -> None:
    run = Run("a", "b", "c")
    run.take(run.schedule(), [1, 2, 3])
    step = run.schedule()
    news = run.scheduler.update(step, StepResult([4, EOS, 5]))
    last = Output("b", 0, (EOS,), FinishReason.STOP, EOS)
    assert len(news) == 3 and ended(news) == [last]
    assert list(news) == [Output("a", 0, (4,)), Output("c", 0, (5,)), last] == list(news)
    assert news[0].request_id == "a" and news[1:] == [news[1], last]
