"""Where a 4-bit cache loses: perplexity and divergence with parts of it in other formats, as the record cache-parts.

    python benchmarks/cache_parts.py measure MODEL --name NAME --calib train.txt --text test.txt --output OUT.json
    python benchmarks/cache_parts.py join part1.json part2.json ... --machine h200

The model is calibrated for `bf16+kv4` once and run on the reference path, its cache as calibrated but for the part that
a row names. No kernel runs such a cache: the rows say where bits would help, not what is served. With --by-layer, keys
or values of one layer alone are rounded.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from unittest import mock

import torch
import tyro
from accuracy_run import AccuracyRun, Join, MeasureOptions
from measured import change_keys, perplexity_keys
from parts import join_parts, scratch
from torch import Tensor

from atom.calibration.stream import quantize_source
from atom.calibration.values import attention_paid
from atom.eval.load import Loaded
from atom.eval.perplexity import Perplexity
from atom.kernels.dense_attention import AttentionSpec, attend_dense
from atom.models import generate
from atom.models.kv import DenseKV
from atom.models.rope import Rotation
from atom.quant.keys import prepare_keys, prepare_queries
from atom.quant.presets import KV_SUFFIXES, get_scheme
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import TensorSpec
from atom.records import Row

RECORD = "cache-parts"
EXACT = "kv16"


@dataclass(frozen=True)
class CachePart:
    """How a row's cache differs: formats as in scheme names, and which tokens are exact.

    first   so many at the start of a sequence
    paid    so many of a sequence that a KV head pays most attention (sum of squared shares)
    recent  so many before each query, itself among them
    layer   the only one that is rounded
    """

    keys: str = "kv4"
    values: str = "kv4"
    first: int = 0
    paid: int = 0
    recent: int = 0
    layer: int | None = None

    @property
    def name(self) -> str:
        """As rows spell it."""
        formats = self.keys if self.keys == self.values else f"keys {self.keys}, values {self.values}"
        tokens = [f"{what} {n} exact" for what in ("first", "paid", "recent") if (n := getattr(self, what))]
        return ", ".join([formats, *tokens, *([] if self.layer is None else [f"layer {self.layer} alone"])])


PARTS = (
    CachePart(),
    CachePart(keys=EXACT),
    CachePart(values=EXACT),
    CachePart(keys="kv8"),
    CachePart(values="kv8"),
    CachePart("kv8", "kv3"),
    CachePart("kv3", "kv8"),
    CachePart("kv3", "kv3"),
    CachePart(first=1),
    CachePart(first=16),
    CachePart(paid=4),
    CachePart(paid=32),
    CachePart(recent=1),
    CachePart(recent=4),
    CachePart(recent=16),
    CachePart(recent=32),
    CachePart(recent=64),
    CachePart(recent=128),
)


class PartlyExactKV(DenseKV):
    """The dense cache with one part of it in another format. Takes whole sequences alone."""

    part = CachePart()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        part, length = self.part, q.shape[0] // self.batch
        if self.scheme_kv is None:
            return super().attend(layer, q, k, v, rotation, spec)
        if part.layer is not None and part.layer != layer:
            part = CachePart(EXACT, EXACT)
        keys = prepare_keys(rotation.apply(k), spec.key_centre, self.rotates)
        rounded = [_rounded(keys, part.keys), _rounded(v.float(), part.values)]
        if part.first or part.paid:
            chosen = torch.arange(length, device=k.device).repeat(self.batch)[:, None] < part.first
            chosen = chosen.expand(-1, k.shape[1])
            if part.paid:
                paid = attention_paid(q, k, rotation.rope(torch.arange(length, device=k.device)), spec)
                ranks = paid.unflatten(0, (self.batch, length)).argsort(1, descending=True).argsort(1)
                chosen = chosen | (ranks.flatten(0, 1) < part.paid)
            rounded = [torch.where(chosen[..., None], a, b) for a, b in zip((keys, v.float()), rounded, strict=True)]
        turned = prepare_queries(rotation.apply(q), spec.key_centre, self.rotates).float()
        queries, read_k, read_v = (self._by_sequence(x) for x in (turned, *rounded))
        if part.recent:
            exact_k, exact_v = self._by_sequence(keys), self._by_sequence(v.float())
            out = attend_apart(queries, read_k, read_v, exact_k, exact_v, spec, part.recent)
        else:
            out = attend_dense(queries, read_k, read_v, spec)
        found: Tensor = out.transpose(1, 2).flatten(0, 1).to(q.dtype)
        return found


def _rounded(x: Tensor, kv: str) -> Tensor:
    spec: TensorSpec | None = KV_SUFFIXES[kv]
    return x if spec is None else fake_quantize(x, spec)


def attend_apart(
    q: Tensor, k: Tensor, v: Tensor, exact_k: Tensor, exact_v: Tensor, spec: AttentionSpec, recent: int
) -> Tensor:
    """Causal attention over k and v, but over the exact ones among the last `recent` tokens of each query.

    q [batch, heads, length, head_dim], the others [batch, num_kv_heads, length, head_dim].
    """
    length, kv_heads = q.shape[2], k.shape[1]
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
    is_near, groups = distance < recent, q.unflatten(1, (kv_heads, -1))
    out = torch.empty_like(groups)
    for at in product(range(q.shape[0]), range(kv_heads)):  # a KV head at a time: scores of all would crowd a GPU
        own = groups[at]  # [heads of it, length, head_dim]
        scores = torch.where(is_near, own @ exact_k[at].T, own @ k[at].T) * spec.scale
        shares = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        near = torch.where(is_near, shares, 0.0)
        out[at] = near @ exact_v[at] + (shares - near) @ v[at]
    return out.flatten(1, 2)


@dataclass(frozen=True)
class Measure(MeasureOptions):
    """Measure one model."""

    by_layer: bool = False
    """Keys and values of each layer alone too."""

    parts: tuple[str, ...] = ()
    """Rows to measure, as the record names them; default: all."""

    batch_tokens: int = 4096
    """Tokens that run at once in calibration."""


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the other accuracy scripts
    run = AccuracyRun(options, batch_tokens=options.batch_tokens, distill_steps=0)
    run.prepare()
    scheme = get_scheme("bf16+kv4")
    with scratch(options.scratch) as folder:
        quantize_source(run.source, scheme, folder / "checkpoint", run.config, run.windows)
        loaded = run.load(folder / "checkpoint")
        layers = range(loaded.model.config.num_layers) if options.by_layer else ()
        alone = [replace(part, layer=i) for i in layers for part in (CachePart(values=EXACT), CachePart(keys=EXACT))]
        for number in range(len(run.texts.texts)):
            full = run.texts.score(run.full, number)
            for part in (*(part for part in PARTS if not options.parts or part.name in options.parts), *alone):
                add_row(run, options, loaded, part, number, full)


def add_row(run: AccuracyRun, options: Measure, loaded: Loaded, part: CachePart, number: int, full: Perplexity) -> None:
    """Measure text `number` through a cache that is changed by `part`."""
    row: Row = {"model": options.name, "part": part.name, "text": run.texts.texts[number].name}
    if run.part.has(RECORD, row):
        return
    PartlyExactKV.part = part
    with mock.patch.object(generate, "DenseKV", PartlyExactKV):
        found = run.texts.score(loaded, number, run.full.model)
    change = change_keys(full, found)
    row |= {"layer": part.layer, **perplexity_keys(loaded, found), "change": change["change"]}
    row |= {"change_se": change["change_se"], "source": options.source}
    run.part.add(RECORD, row | run.calibration(0))


def join(options: Join) -> None:
    join_parts(options.parts, [RECORD], options.commit)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
