"""The fused producers at decode and prefill sizes: microseconds inside a CUDA graph and bytes read and written.

python -m benchmarks.bench_producers              writes benchmarks/results/h200/producers.json
python -m benchmarks.bench_producers --compile-only
"""

import argparse
import time
from functools import partial
from typing import Any

import torch

from atom.kernels.producers import QuantizingProducer, producer_kernel
from atom.quant.presets import get_scheme

from .timing import BANDWIDTH, keep, save, time_calls

# op, source, hidden of Llama-3-8B
OPS = (("rms_norm_quantize", "norm", 4096), ("permute_quantize", "plain", 4096), ("gated_quantize", "silu", 14336))
TOKENS = (1, 16, 256, 8192)
SCHEMES = ("w4a4", "w4a8")
ROTATE_BYTES = 200_000_000


def producer(op: str, source: str, scheme: str, hidden: int, device: str) -> QuantizingProducer:
    linear = get_scheme(scheme).for_linear("x")
    perm = torch.randperm(hidden, device=device) if linear.reorder and source != "silu" else None
    gain = torch.rand(hidden, device=device) if source == "norm" else None
    return QuantizingProducer(source, linear, perm, gain, 1e-5)


def measure() -> list[dict[str, Any]]:
    rows = []
    for op, source, hidden in OPS:
        for scheme in SCHEMES:
            run = producer(op, source, scheme, hidden, "cuda")
            for M in TOKENS:
                inputs = 2 if source == "silu" else 1
                row_bytes = 2 * hidden * inputs
                copies = min(64, max(2, ROTATE_BYTES // (M * row_bytes)))
                x = [torch.randn(inputs, M, hidden, device="cuda").bfloat16() for _ in range(copies)]
                count = max(copies, 64 if M <= 256 else 4)
                calls = [partial(run, *x[i % copies].unbind(0)) for i in range(count)]
                us = time_calls({"us": calls})["us"]
                out = run(*x[0].unbind(0))
                moved = M * row_bytes + out.packed.numel() + 4 * out.scale.shape[0] * M
                started = time.perf_counter()
                for call in calls:
                    call()
                host = (time.perf_counter() - started) / len(calls) * 1e6
                torch.cuda.synchronize()
                rows.append({"op": op, "scheme": scheme, "M": M, "hidden": hidden, "us": round(us, 2),
                             "gbps": round(moved / us / 1e3, 1)})  # fmt: skip
                share = moved / us / 1e-6 / BANDWIDTH
                print(f"{op:18} {scheme} M={M:<5} hidden {hidden:<6} {us:8.2f} us  {moved / us / 1e3:7.0f} GB/s "
                      f"{share:4.0%}  host {host:.1f} us a call", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.compile_only:
        for op, source, hidden in OPS:
            for scheme in SCHEMES:
                producer_kernel(producer(op, source, scheme, hidden, "cpu").config(torch.bfloat16, hidden))
        return
    if args.record:
        save("producers", args.record)
        return
    keep("producers", measure(), args.out)


if __name__ == "__main__":
    main()
