"""What a calibration run did, as `atom_report.json` beside the weights: provenance, errors, outliers, time, memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atom.checkpoint import REPORT_FILE, read_json
from atom.errors import CheckpointError

from .clock import PHASES


@dataclass
class Report:
    """A finished calibration run.

    provenance   source and revision, data with the hash of its tokens, seed, versions, commit
    scheme       Scheme.to_dict(), and `config` CalibrationConfig.to_dict()
    layers       one entry a decoder layer: relative errors of weights and outputs, statistics of the inputs,
                 seconds by phase, peak memory; empty where nothing was calibrated
    totals       seconds by phase and in all, bytes written, peak memory
    clips        the activation clips that were chosen for each kind of input, the output errors of all candidates,
                 the tokens it was measured on, seconds; None where the scheme's constants were taken
    distilled    steps, tokens, seconds, and the divergence on held-back text before and after; None without
    """

    provenance: dict[str, Any]
    scheme: dict[str, Any]
    config: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    clips: dict[str, Any] | None = None
    distilled: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, directory: Path) -> "Report":
        """The report of a checkpoint. Raises CheckpointError if there is none or it is damaged."""
        data = read_json(directory / REPORT_FILE)
        try:
            return cls(**data)
        except TypeError as error:
            raise CheckpointError(
                f"{directory / REPORT_FILE} is no calibration report ({error}); quantize again to have one"
            ) from error

    def errors(self, what: str) -> dict[str, list[float]]:
        """`weight_error` or `output_error` of each linear over the layers, by the linear's name within its layer."""
        found: dict[str, list[float]] = {}
        for layer in self.layers:
            for name, linear in layer["linears"].items():
                found.setdefault(name, []).append(linear[what])
        return found


def total(layers: Sequence[dict[str, Any]], seconds: float, written: int) -> dict[str, Any]:
    """The totals of a run from its layers' entries."""
    phases = {phase: round(sum(layer["seconds"].get(phase, 0.0) for layer in layers), 3) for phase in PHASES}
    return {
        "seconds": round(seconds, 3),
        "seconds_by_phase": phases,
        "bytes": written,
        "peak_gpu_bytes": max((layer["peak_gpu_bytes"] for layer in layers), default=0),
        "peak_host_bytes": max((layer["peak_host_bytes"] for layer in layers), default=0),
    }
