"""Perplexity over a quantized cache through the attention kernels and through the torch reference, on the same windows.

    python -m benchmarks.attention_perplexity NAME=MODEL --text wikitext2=FILE -o F     on a GPU, a model at a time
    ... NAME=CHECKPOINT --kv int4   the cache with what calibration found for it (`atom quantize --scheme bf16+kv4`)
    python -m benchmarks.attention_perplexity --record F1 F2 ...                        the record attention-perplexity

Weights are in bfloat16 and everything but the cache is the same torch code both times, so that what differs is
appending, prefill and decode. Through the kernels the first half of a window is prefilled in one chunk, and the tokens
of the second are decoded one by one with all windows in a batch. The reference takes each window in one chunk: a token
attends over the same rounded keys and values in a chunk or alone, its own included, and chunks are far faster there.

A code at half a step falls to either side of a rounding, and all that follows it in its window differs a little: the
change of a few tokens is chance. So each row has its standard error, from the differences of whole windows.
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from atom.eval.perplexity import make_windows
from atom.eval.texts import load_text
from atom.kernels.registry import Kernels
from atom.models.loader import load_model, load_tokenizer
from atom.models.model import Model
from atom.quant.presets import get_scheme
from atom.records import write_record
from atom.serving.batch import Batch, unsampled
from atom.serving.kv_pool import KVPool, PagedKV
from atom.serving.recent import RecentRoom

from .timing import keep

BLOCK = 16
AT_ONCE = 2048  # tokens of a step, so that logits of a large vocabulary find room
SCHEMES = {"int4": "bf16+kv4", "int4r16": "bf16+kv4r16", "int8": "bf16+kv8", "fp8": "bf16+kvfp8", "bf16": "bf16"}
Row = dict[str, Any]
MODES = ("prefill", "decode")


def batch_of(tables: np.ndarray, windows: np.ndarray, starts: int, tokens: np.ndarray) -> Batch:
    """A step of some windows, of each the same number of tokens [n, count] from position `starts` on."""
    count = tokens.shape[1]
    positions = np.tile(np.arange(starts, starts + count, dtype=np.int32), len(windows))
    owner = windows.repeat(count)
    return unsampled(
        token_ids=tokens.reshape(-1).astype(np.int32),
        positions=positions,
        slots=tables[owner, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        cu_seqlens_q=np.arange(len(windows) + 1, dtype=np.int32) * count,
        seqlens_k=np.full(len(windows), starts + count, dtype=np.int32),
        block_tables=tables[windows],
        lanes=windows.astype(np.int32),
        num_decodes=len(windows) if count == 1 else 0,
    )


@torch.inference_mode()
def losses(model: Model, ids: Tensor, decoded: int, kernels: Kernels) -> dict[str, NDArray[np.float64]]:
    """Nats [windows], summed over the tokens before the last `decoded` of each, and over those.

    The last ones are predicted in decode where the kernels are not the reference.
    """
    count, length = ids.shape
    blocks = -(-length // BLOCK)
    tables = np.random.default_rng(0).permutation(count * blocks).astype(np.int32).reshape(count, blocks)
    room = RecentRoom(count, max(count, AT_ONCE, length))
    pool = KVPool(model.config, model.scheme, count * blocks, BLOCK, model.dtype, model.device, room)
    kv = PagedKV(pool, kernels)
    tokens = ids.numpy()

    def run(windows: NDArray[np.int64], start: int, stop: int) -> NDArray[np.float64]:
        """[windows, stop - start]: the predictions that tokens start ... stop - 1 of each window make."""
        batch = batch_of(tables, windows, start, tokens[windows, start:stop])
        kv.begin(batch)
        on_device = [torch.from_numpy(x).long().to(model.device) for x in (batch.token_ids, batch.positions)]
        logits = model.logits(model(*on_device, kv))
        targets = torch.from_numpy(tokens[windows, start + 1 : stop + 1]).reshape(-1).to(model.device)
        found = cross_entropy(logits.float(), targets, reduction="none").double()
        return np.asarray(found.unflatten(0, (len(windows), -1)).cpu(), dtype=np.float64)

    last = length - 1
    first = last - decoded
    chunk = last if kernels == "reference" else first
    nats = np.zeros((count, last))
    at_once = max(1, AT_ONCE // chunk)
    for start in range(0, count, at_once):
        some = np.arange(start, min(count, start + at_once))
        nats[some, :chunk] = run(some, 0, chunk)
    for at in range(chunk, last):
        nats[:, at : at + 1] = run(np.arange(count), at, at + 1)
    return {"prefill": nats[:, :first].sum(1), "decode": nats[:, first:].sum(1)}


def rows(
    name: str, path: str, text: str, formats: list[str], shape: tuple[int, int, int], device: str
) -> Iterator[Row]:
    """Of each format: prefill, decode, and both. `shape`: windows, tokens of each, decoded ones among them."""
    count, length, decoded = shape
    source = load_text(text)
    ids = make_windows(load_tokenizer(path), source, window=length, limit=count).tokens
    model = load_model(path, device, torch.bfloat16, kernels="reference")
    is_calibrated = model.scheme is not None and model.scheme.is_quantized
    tokens = {"prefill": length - 1 - decoded, "decode": decoded, "both": length - 1}
    for kv in formats:
        model.scheme = get_scheme(SCHEMES[kv])
        found: dict[str, dict[str, NDArray[np.float64]]] = {}
        for path_name, kernels in (("reference", "reference"), ("kernels", "auto")):
            start = time.perf_counter()
            found[path_name] = losses(model, ids, decoded, kernels)  # type: ignore[arg-type]
            print(f"{name} {kv} {path_name} took {time.perf_counter() - start:.0f} s", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        for each in found.values():
            each["both"] = each["prefill"] + each["decode"]
        for mode in tokens:
            wanted, got = (found[each][mode] / tokens[mode] for each in ("reference", "kernels"))
            row = {
                "model": name, "text": source.name, "kv": kv, "calibrated": is_calibrated, "op": mode,
                "windows": len(ids), "window": length, "tokens": len(ids) * tokens[mode],
                "ppl": round(math.exp(got.mean()), 4), "ppl_reference": round(math.exp(wanted.mean()), 4),
                "change": round(math.expm1(float((got - wanted).mean())), 6),
                "change_se": round(float((got - wanted).std(ddof=1)) / math.sqrt(len(ids)), 6),
            }  # fmt: skip
            print(
                "{model:12} {kv:5} {op:8} {tokens:>6} tokens: {ppl:9.4f} by kernels, {ppl_reference:9.4f} by "
                "the reference, {change:+.3%} +- {change_se:.3%}".format(**row),
                flush=True,
            )
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="what the record calls it, =, directory or GGUF file")
    parser.add_argument("--text", default="wikitext2", help="as `atom eval --text`")
    parser.add_argument("--kv", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--decoded", type=int, default=512, help="last tokens of each window that are decoded")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--out", help="where rows and circumstances go, configuration by configuration")
    parser.add_argument("--record", nargs="+", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.record:
        parts = [json.loads(Path(file).read_text()) for file in args.record]
        where, commit = parts[0]["where"], parts[0]["commit"]
        together: list[Row] = []
        for part in parts:
            differs = {} if part["commit"] == commit else {"commit": part["commit"]}
            together += [{**differs, **row} for row in part["rows"]]
        print(write_record("attention-perplexity", together, where["machine"]["name"], where=where, commit=commit))
        return
    if not args.model:
        parser.error("which model?")
    name, _, path = args.model.rpartition("=")
    found: list[Row] = []
    shape = (args.windows, args.window, args.decoded)
    for row in rows(name or Path(path).stem, path, args.text, args.kv, shape, args.device):
        found.append(row)
        if args.out:
            keep("attention-perplexity", found, args.out)


if __name__ == "__main__":
    main()
