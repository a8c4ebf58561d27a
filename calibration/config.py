"""How a scheme's weights are found: the choices of calibration, as one frozen value.

The scheme says what is executed and is written into the checkpoint; what is here is written into the report and,
while a run is under way, beside its shards, so that `--resume` can refuse a run that was started otherwise.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Offload = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class CalibrationConfig:
    """The choices of one calibration run.

    data             wikitext2, c4, pile, self, or a .txt, .jsonl or .parquet file (.gz too)
    num_windows      windows of calibration text
    window_length    tokens in each
    seed             draws the windows (and the text, for `self`)
    gptq             False rounds to nearest
    damping          share of the Hessian's mean diagonal that is added to the diagonal
    device           cpu, cuda, cuda:1, or auto: cuda where there is one
    batch_tokens     tokens that run through a layer at once: bounds the activations in memory
    offload          keep hidden states in host memory: on, off, or auto (on a GPU that they would fill a quarter of)
    matmul_precision torch.set_float32_matmul_precision: "high" allows TF32 on a GPU, "highest" does not
    """

    data: str = "wikitext2"
    num_windows: int = 128
    window_length: int = 2048
    seed: int = 0
    gptq: bool = True
    damping: float = 0.01
    device: str = "auto"
    batch_tokens: int = 8192
    offload: Offload = "auto"
    matmul_precision: Literal["highest", "high"] = "high"

    def __post_init__(self) -> None:
        for name in ("num_windows", "window_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the default")
        if self.window_length < 2:
            raise ValueError(f"window_length must be at least 2 tokens, got {self.window_length}; use 512 or 2048")
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping is a share between 0 and 1, got {self.damping}; use 0.01")
        if self.offload not in ("auto", "on", "off"):
            raise ValueError(f"offload must be auto, on or off, got {self.offload!r}; use auto")
        if self.matmul_precision not in ("highest", "high"):
            raise ValueError(f"matmul_precision must be highest or high, got {self.matmul_precision!r}; use high")

    @property
    def windows_per_batch(self) -> int:
        return max(1, min(self.num_windows, self.batch_tokens // self.window_length))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CalibrationConfig":
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"CalibrationConfig does not know {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**data)
