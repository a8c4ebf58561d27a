"""The masks of a step whose sequences are guided, and the tokens that move their matchers on.

A sequence's next mask depends on its last token, which may still be on its way from the device. So a step's forward
pass is launched first; then the host waits for the tokens of the steps before, moves the matchers on, and fills the
masks while the device computes. Only sampling comes after them.

Matchers work in threads: side by side, without Python's lock, and within a time limit. One that takes longer has an
empty mask, which ends its sequence with an error; the engine goes on.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from .guide import Matcher, mask_words
from .sequence import Sequence as Sample

logger = logging.getLogger(__name__)

MASK_S = 2.0  # for the masks of a step; they usually take a millisecond or two
THREADS = max(2, min(16, (os.cpu_count() or 2) // 2))

Tokens = Callable[[], Sequence[int]]
Row = NDArray[np.int32]


class GuidedLane:
    """One guided sequence.

    matcher  None after it took too long
    stops    its EOS and stop tokens, as a row of a mask
    news     tokens the matcher has not seen
    """

    def __init__(self, matcher: Matcher, stops: Row, news: Sequence[int]) -> None:
        self.matcher: Matcher | None = matcher
        self.stops = stops
        self.news = list(news)

    def work(self, words: int) -> Callable[[], Row]:
        """What a thread has to do: take the news, and say what may follow."""
        matcher, news = self.matcher, self.news
        self.news = []

        def advance() -> Row:
            row = np.zeros(words, dtype=np.int32)
            if matcher is not None:
                for token in news:
                    matcher.accept(token)
                matcher.fill(row)
            return row

        return advance


class GuidedLanes:
    """The guided sequences by lane. Used by the engine's thread."""

    def __init__(self, vocab_size: int) -> None:
        self._words = mask_words(vocab_size)
        self._lanes: dict[int, GuidedLane] = {}
        self._pending: list[tuple[Tokens, list[tuple[int, GuidedLane]]]] = []  # steps whose tokens are to be accepted
        self._threads: ThreadPoolExecutor | None = None

    def admit(self, lane: int, sequence: Sample) -> None:
        """A sequence takes a lane, with the output it has."""
        guide = sequence.request.guide
        if guide is None:
            self._lanes.pop(lane, None)
            return
        stops = np.zeros(self._words * 32, dtype=np.uint8)
        stops[list(sequence.stop_token_ids | sequence.guided_ends)] = 1
        row = np.packbits(stops, bitorder="little").view(np.int32)
        self._lanes[lane] = GuidedLane(guide.start(), row, sequence.token_ids[sequence.num_prompt :])

    def mask(self, lanes: NDArray[np.int32], masks_stop: NDArray[np.bool_]) -> tuple[Row | None, NDArray[np.bool_]]:
        """What these lanes may sample next (`Sampler.sample`'s mask, None if it is anything), and masks_stop.

        Where a text is complete and nothing but a stop token may follow, masks_stop is false: min_tokens gives way.
        Waits for the tokens of the steps that were given to `follow`.
        """
        guided = self._rows_of(lanes)
        if not guided:
            return None, masks_stop
        self._settle()
        mask = np.full((len(lanes), self._words), -1, dtype=np.int32)
        masks_stop = masks_stop.copy()
        for (row, lane), found in zip(guided, self._masks([each for _, each in guided]), strict=True):
            mask[row] = found
            if masks_stop[row] and not (found & ~lane.stops).any():
                masks_stop[row] = False
        return mask, masks_stop

    def follow(self, lanes: NDArray[np.int32], tokens: Tokens) -> None:
        """A step samples for these lanes; tokens() waits for what it sampled, FAULTY included."""
        if rows := self._rows_of(lanes):
            self._pending.append((tokens, rows))

    def reset(self) -> None:
        """A step failed: its tokens and those of later steps never come."""
        self._pending.clear()

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        for tokens, rows in pending:
            found = tokens()
            for row, lane in rows:
                if found[row] >= 0:
                    lane.news.append(found[row])

    def _rows_of(self, lanes: NDArray[np.int32]) -> list[tuple[int, GuidedLane]]:
        """The rows whose lanes are guided."""
        if not self._lanes:
            return []
        return [(row, each) for row, lane in enumerate(lanes.tolist()) if (each := self._lanes.get(lane)) is not None]

    def _masks(self, lanes: list[GuidedLane]) -> list[Row]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "guidance-mask")
        futures: list[Future[Row]] = [self._threads.submit(lane.work(self._words)) for lane in lanes]
        done, _ = wait(futures, MASK_S)
        for lane, future in zip(lanes, futures, strict=True):
            if future not in done:
                future.cancel()
                lane.matcher = None  # a thread may still be at it
                logger.warning("structured output ends with an error: a mask took more than %g s", MASK_S)
        return [f.result() if f in done else np.zeros(self._words, dtype=np.int32) for f in futures]
