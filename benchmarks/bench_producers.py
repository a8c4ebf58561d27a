"""The fused producers at decode and prefill sizes: microseconds inside a CUDA graph and bytes read and written.

python -m benchmarks.bench_producers              writes benchmarks/results/h200/producers.json
python -m benchmarks.bench_producers --compile-only

Schemes and ops that have not been verified take part with ATOM_UNVERIFIED_KERNELS=1.
"""

import argparse
import sys
from functools import partial

import torch

from atom.kernels.bench import OPS, KernelsConfig, bench_kernels, problems, records, runs_here, table
from atom.kernels.bench_producers import make_producer
from atom.kernels.cache import compile_together
from atom.kernels.producers import producer_kernel
from atom.quant.presets import get_scheme

from .timing import keep, save

TOKENS = (1, 16, 256, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.record:
        save("producers", args.record)
        return
    ops = [op for op in OPS if op != "linear"]
    # few tokens first: behind many the clocks are low for a while
    wanted = [KernelsConfig(op=op, tokens=(M,)) for M in TOKENS for op in ops]  # type: ignore[arg-type]
    if args.compile_only:
        configs = {
            kernel
            for config in wanted
            for op, name, _, sizes in problems(config)
            if runs_here(op, get_scheme(name).for_linear("x"), 0, sizes["K"])[0] == "producers_sm90"
            for kernel in make_producer(op, get_scheme(name).for_linear("x"), sizes["K"], "cpu").configs(
                torch.bfloat16, sizes["K"]
            )
        }
        compile_together([partial(producer_kernel, config) for config in configs])
        print(f"{len(configs)} kernels in the cache")
        return
    rows = [row for config in wanted for row in bench_kernels(config, partial(print, file=sys.stderr))]
    rows.sort(key=lambda row: (ops.index(row["op"]), wanted[0].scheme.index(row["scheme"]), row["M"]))
    print(table(rows))
    keep("producers", records(rows)["producers"], args.out)


if __name__ == "__main__":
    main()
