"""Whether a square of prefill attention is worth its preparation: no GPU, no torch.

cuDNN prepares itself for every new shape, 40 ms on the host in which nothing else goes out; prompts of all lengths
behind prefixes of all lengths bring a new one in nearly every step. So a shape is rented before it is bought: chunks go
through ragged attention until that has lost as much time as the preparation takes. Whatever comes, no more is lost than
twice what would have been best.
"""

from dataclasses import dataclass

PREPARE_S = 0.04  # of the host, on an H200
GAIN_S = 1.5e-15  # that a square saves a flop: 1.0 behind long prefixes to 2.7 for small ones (docs/kernels/prefill.md)


@dataclass(frozen=True)
class SquareShape:
    """What cuDNN prepares itself for: equal chunks, queries and keys of each, rows from one's to the next one's."""

    count: int
    queries: int
    keys: int
    stride: int


class SquareShapes:
    """What ragged attention has lost on each shape so far, in seconds.

    A step's loss is that of a layer times the layers, which are counted: `count_layer` at each call.

    prepare_s  seconds that a preparation takes; 0: every shape is taken at once
    """

    def __init__(self, prepare_s: float | None = None) -> None:
        self.prepare_s = PREPARE_S if prepare_s is None else prepare_s
        self.lost: dict[SquareShape, float] = {}
        self.layers = 1
        self.calls = 0

    def count_layer(self) -> None:
        self.calls += 1

    def begin_step(self) -> None:
        """Before a plan: the calls since the last one were the layers."""
        if self.calls:
            self.layers, self.calls = self.calls, 0

    def prepared(self, shape: SquareShape) -> None:
        """It is ready, whatever it has been worth."""
        self.lost[shape] = self.prepare_s

    def takes(self, shapes: tuple[SquareShape, ...], flops: float) -> bool:
        """Whether chunks of so many flops a layer go through these shapes; if not, what that loses is counted."""
        new = [shape for shape in shapes if self.lost.get(shape, 0.0) < self.prepare_s]
        for shape in new:
            self.lost[shape] = self.lost.get(shape, 0.0) + GAIN_S * flops * self.layers / len(new)
        return all(self.lost.get(shape, 0.0) >= self.prepare_s for shape in shapes)
