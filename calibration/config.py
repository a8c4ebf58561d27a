"""How a scheme's weights are found: the choices of calibration, as one frozen value.

The scheme says what is executed and is written into the checkpoint; what is here is written into the report and,
while a run is under way, beside its shards, so that `--resume` can refuse a run that was started otherwise.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from atom.quant.schemes import Scheme

Offload = Literal["auto", "on", "off"]
Precision = Literal["highest", "high"]
Clip = Literal["measured", "constant"]
Rotate = Literal["none", "values", "residual"]
Order = Literal["ascending", "dealt"]
ScaleSearch = Literal["rounding", "feedback"]


@dataclass(frozen=True)
class CalibrationConfig:
    """How weights are found."""

    calib: str = "wikitext2"
    """wikitext2, c4, pile (through `datasets`; wikitext2=FILE for a local copy), a .txt, .jsonl or .parquet file (.gz
    too), or self (sampled text)."""

    windows: int = 128
    """Windows of calibration text."""

    window_length: int = 2048
    """Tokens of a window."""

    seed: int = 0
    """Draws the windows (and the text, for self)."""

    gptq: bool = True
    """Correct each column's error in the columns after it; --no-gptq rounds to nearest."""

    damping: float = 0.01
    """GPTQ: share of the Hessian's mean diagonal that is added to the diagonal."""

    scale_search: ScaleSearch = "rounding"
    """GPTQ, where weight clips are searched (mse): by a group's rounding error alone, or by what GPTQ makes of it."""

    act_order: bool = False
    """GPTQ: within each group, round the columns of the largest inputs first."""

    true_sequential: bool = False
    """GPTQ: o sees what rounded q, k and v give, gate and up what rounded o gives, down what all of them give."""

    clip: Clip = "measured"
    """Activation clips: measured for each kind of input by its linears' output error, or the scheme's constant."""

    balance_keys: bool = True
    """Where the cache rotates keys: divide them by factors that queries undo, pair by pair, in the weights."""

    rotate: Rotate | None = None
    """Folds Hadamard rotations into the weights: none, each head's values, or (residual) the residual stream as well.
    Default: values where the scheme rotates inputs by blocks, or rounds nothing but the cache."""

    order: Order = "ascending"
    """Of reordered channels: ascending in energy, or dealt out to the blocks of a block_hadamard rotation."""

    balance: bool | None = None
    """Fold a factor per channel into norms, v and up, so that activations and weights round equally well. Default:
    where the scheme rotates inputs by blocks."""

    distill_steps: int | None = None
    """Train the rounded checkpoint to predict what the full model predicts, for so many batches of --distill-tokens; 0
    does not. Default: 100 where weights of 4 bits are calibrated on a GPU that holds both models, else 0."""

    distill_tokens: int = 4096
    """Tokens of a step of distillation, whole windows, one at least."""

    distill_calib: tuple[str, ...] = ()
    """Texts to distil on, in equal shares; default: that of --calib."""

    distill_seconds: float = 600.0
    """Fewer steps, if they would take longer than this."""

    distill_windows: int = 512
    """Windows of calibration text to train on; others are drawn to judge by."""

    distill_rate: float = 0.003
    """Learning rate of scales, norms and biases, relative to their size."""

    distill_codes: bool = False
    """Codes learn as well, at that rate in units of their grid; they start where the weights were."""

    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: cuda where there is one."""

    batch_tokens: int = 8192
    """Tokens that run through a layer at once: bounds the activations in memory."""

    offload: Offload = "auto"
    """Hidden states in host memory: on, off, or auto (on a GPU of which they would fill a quarter)."""

    matmul_precision: Precision = "high"
    """float32 products: high allows TF32 on a GPU, highest does not."""

    def __post_init__(self) -> None:
        for name in ("windows", "window_length", "batch_tokens", "distill_windows", "distill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the default")
        if self.window_length < 2:
            raise ValueError(f"window_length must be at least 2 tokens, got {self.window_length}; use 512 or 2048")
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping is a share between 0 and 1, got {self.damping}; use 0.01")
        if self.clip not in ("measured", "constant"):
            raise ValueError(f"clip must be measured or constant, got {self.clip!r}; use measured")
        if (self.distill_steps or 0) < 0 or self.distill_seconds <= 0 or self.distill_rate <= 0:
            raise ValueError(
                f"distill_steps {self.distill_steps}, distill_seconds {self.distill_seconds}, distill_rate "
                f"{self.distill_rate}: steps count from 0, time and rate are positive; try 300 steps, 600 s, 0.003"
            )
        if self.order not in ("ascending", "dealt"):
            raise ValueError(f"order must be ascending or dealt, got {self.order!r}; use dealt with block_hadamard")
        if self.scale_search not in ("rounding", "feedback"):
            raise ValueError(f"scale_search must be rounding or feedback, got {self.scale_search!r}; use feedback")
        if self.rotate is not None and self.rotate not in get_args(Rotate):
            raise ValueError(f"rotate must be one of {', '.join(get_args(Rotate))}, got {self.rotate!r}; use values")
        if self.offload not in ("auto", "on", "off"):
            raise ValueError(f"offload must be auto, on or off, got {self.offload!r}; use auto")
        if self.matmul_precision not in ("highest", "high"):
            raise ValueError(f"matmul_precision must be highest or high, got {self.matmul_precision!r}; use high")

    def for_scheme(self, scheme: Scheme) -> "CalibrationConfig":
        """This, with what is left to the scheme decided."""
        by_blocks = scheme.rotation is not None and scheme.rotation.kind == "block_hadamard"
        balance = by_blocks if self.balance is None else self.balance
        is_cache_alone = scheme.stores_key_centre and scheme.weight is None and not scheme.overrides
        rotate: Rotate = ("values" if by_blocks or is_cache_alone else "none") if self.rotate is None else self.rotate
        return replace(self, balance=balance, rotate=rotate)

    @property
    def windows_per_batch(self) -> int:
        return max(1, min(self.windows, self.batch_tokens // self.window_length))

    def to_dict(self) -> dict[str, Any]:
        """As JSON would read it back."""
        return {**asdict(self), "distill_calib": list(self.distill_calib)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CalibrationConfig":
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"CalibrationConfig does not know {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**{**data, "distill_calib": tuple(data.get("distill_calib", ()))})
