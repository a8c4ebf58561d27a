"""The passes over a model's layers: clips are measured, layers quantized, or copied as they are."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atom.checkpoint import CheckpointWriter
from atom.models.layers import DecoderLayer
from atom.models.layout import is_ignored, layer_prefix
from atom.models.model import Model
from atom.models.shards import Shards
from atom.models.source import Source
from atom.quant.schemes import Scheme

from .clips import ClipProbe, Measured, measured_groups, probe_windows
from .clock import Clock
from .config import CalibrationConfig, Offload
from .data import Windows
from .hidden import HiddenStates
from .layer import LayerQuantizer
from .progress import Progress

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Passes:
    """One run of calibration: from a source into a writer, which knows what an earlier run of it has done.

    model  on the meta device
    """

    source: Source
    model: Model
    config: CalibrationConfig
    writer: CheckpointWriter
    progress: Progress

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def measure_clips(self, scheme: Scheme, windows: Windows) -> tuple[Scheme, dict[str, Any] | None]:
        """`scheme` with the clips that fit this model, and the report's entry; a resumed run takes the first one's."""
        groups = measured_groups(self.model, scheme)
        if not groups:
            return scheme, None
        record = self.writer.noted("clips")
        if record is None:
            start = time.perf_counter()
            quantizer = self._quantizer(scheme, Clock(self.device))
            tokens = probe_windows(windows.tokens)
            hidden = self._embed(tokens, "off")

            def layers() -> Iterator[DecoderLayer]:
                for index in range(self.model.config.num_layers):
                    self.progress.layer(index, self.model.config.num_layers, "measuring clips")
                    yield quantizer.load(index)

            probe = ClipProbe(self.model, scheme, quantizer.runner)
            record = {**probe.measure(hidden, layers()).to_dict(), "seconds": round(time.perf_counter() - start, 3)}
            self.writer.note("clips", record)
        found = Measured(record["chosen"], record["errors"], record["tokens"])
        return found.apply(scheme, groups), record

    def quantize_layers(self, scheme: Scheme, windows: Windows) -> list[dict[str, Any]]:
        """Write every layer under `scheme`; the report's entries. What an earlier run wrote is only run again."""
        hidden = self._embed(windows.tokens, self.config.offload)
        clock = Clock(self.device)
        quantizer = self._quantizer(scheme, clock)
        records = []
        for index in range(self.model.config.num_layers):
            start = time.perf_counter()
            done = self.writer.noted(f"layer-{index}")
            if self.writer.has_shard(index + 2) and done is not None:
                self.progress.layer(index, self.model.config.num_layers, "running the quantized layer again")
                written = Source(self.writer.partial, self.source.config, {}, {}, Shards(self.writer.partial))
                quantizer.rerun(index, written, hidden)
                records.append(done)
                continue
            self.progress.layer(index, self.model.config.num_layers, "quantizing")
            tensors, record = quantizer.quantize(index, hidden)
            with clock.phase("io"):
                self.writer.write_shard(index + 2, tensors)
            record["seconds"] = clock.take()
            record["seconds"]["total"] = round(time.perf_counter() - start, 4)
            self.writer.note(f"layer-{index}", record)
            records.append(record)
            self.progress.done(record)
        return records

    def copy_layers(self) -> None:
        """Write every layer as it is."""
        for index in range(self.model.config.num_layers):
            self.progress.layer(index, self.model.config.num_layers, "copying")
            if not self.writer.has_shard(index + 2):
                prefix = f"{layer_prefix(index)}."
                names = [n for n in self.source.names() if n.startswith(prefix) and not is_ignored(n, self.model)]
                self.writer.write_shard(index + 2, {name: self.source.get(name) for name in names})

    def _quantizer(self, scheme: Scheme, clock: Clock) -> LayerQuantizer:
        return LayerQuantizer(self.source, self.model, scheme, self.config, self.device, clock)

    def _embed(self, tokens: Tensor, offload: Offload) -> HiddenStates:
        """The hidden states that enter the first layer, of tokens [windows, length]."""
        scale = self.model.config.embedding_scale
        embedding = self.source.get(EMBEDDING)
        on_host = offload == "on"
        if offload == "auto" and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            on_host = tokens.numel() * embedding.shape[1] * 4 > free // 4
        if not on_host:
            embedding, tokens = embedding.to(self.device), tokens.to(self.device)
        states = embedding[tokens].float()
        if scale is not None:
            states *= torch.tensor(scale)
        if on_host and self.device.type == "cuda":
            states = states.pin_memory()
        return HiddenStates(states, self.config.windows_per_batch, self.device)
