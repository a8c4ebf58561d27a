"""The tokens that the engine handed to the front end, by request: what clients got must be these, each once."""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from atom.serving.frontend import Frontend
from atom.serving.sequence import Output

from .soak_report import Token

KEPT_REQUESTS = 1024  # far more than are ever under way
KEPT_ANSWERS = 96
SHORTEST = 8  # tokens of an answer that is worth computing once more


@dataclass(frozen=True)
class Answer:
    """A whole answer: the tokens of its prompt and its own, and their log-probabilities in the batches they ran in."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Recorder:
    """Listens between engine and front end; make it before the front end is started.

    answers  a random choice of the whole answers so far
    """

    def __init__(self, frontend: Frontend, seed: int) -> None:
        self.answers: list[Answer] = []
        self._tokenizer = frontend.tokenizer
        self._found: OrderedDict[str, dict[int, list[int]]] = OrderedDict()
        self._hand_on = frontend._receive
        self._num_answers = 0
        self._draw = random.Random(seed)
        frontend._receive = self._receive  # type: ignore[method-assign]

    def _receive(self, outputs: Sequence[Output]) -> None:  # on the engine's thread
        for output in outputs:
            samples = self._found.setdefault(output.request_id, {})
            samples.setdefault(output.index, []).extend(output.token_ids)
        while len(self._found) > KEPT_REQUESTS:
            self._found.popitem(last=False)
        self._hand_on(outputs)

    def compare(self, request_id: str, index: int, got: list[Token], is_whole: bool) -> str | None:
        """How a client's tokens of a sample differ from the engine's; None if they are all or the first of these."""
        made = self._found.get(request_id, {}).get(index, [])
        shown = [self._tokenizer.token_text(token) for token in made]
        if (len(got) == len(made) or not is_whole) and [t.text for t in got] == shown[: len(got)]:
            return None
        return f"the engine made {shown[:40]}, {len(got)} tokens came: {[token.text for token in got[:40]]}"

    def keep(self, request_id: str, index: int, prompt: list[int], got: list[Token]) -> None:
        """Maybe add a whole answer to `answers`: each has the same chance."""
        if len(got) < SHORTEST:
            return
        self._num_answers += 1
        made = tuple(self._found[request_id][index])
        answer = Answer(tuple(prompt), made, tuple(token.logprob for token in got))
        if len(self.answers) < KEPT_ANSWERS:
            self.answers.append(answer)
        elif (place := self._draw.randrange(self._num_answers)) < KEPT_ANSWERS:
            self.answers[place] = answer
