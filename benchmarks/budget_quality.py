"""What --budget and --max-loss buy on a real model: bits, predicted loss, perplexity and divergence of what they
choose, beside schemes that are the same everywhere, as the record quality-budget.

    python benchmarks/budget_quality.py measure MODEL --name NAME --calib train.txt --text test.txt --budgets 4.3 5 \\
        --output OUT.json
    python benchmarks/budget_quality.py join part1.json part2.json ...

Losses are measured once a model, and kept beside the part. Checkpoints are rounded with GPTQ, not distilled, and run on
the reference path.
"""

import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import tyro
from accuracy_run import AccuracyRun, Join, MeasureOptions
from measured import change_keys, perplexity_keys
from parts import join_parts, scratch

from atom.calibration.budget import build_scheme, mean_bits, measure_losses
from atom.calibration.data import load_windows
from atom.calibration.knapsack import Knapsack, Plan, plan_of
from atom.calibration.places import find_places
from atom.calibration.stream import quantize_source
from atom.errors import AtomError
from atom.eval.load import load
from atom.quant.presets import get_scheme, kv_name

RECORD = "quality-budget"


@dataclass(frozen=True)
class Measure(MeasureOptions):
    """Measure one model."""

    scheme: str = "w4a4"
    """The base, whose formats the choices replace."""

    budgets: tuple[float, ...] = ()
    """Bits an operand."""

    max_losses: tuple[float, ...] = ()
    """Nats a token."""

    uniform: tuple[str, ...] = ("w4a4",)
    """Presets to compare with: one format everywhere."""

    budget_windows: int = 8
    """Calibration windows that losses are measured on."""

    budget_length: int = 512
    """Tokens of each of them."""

    kernels: bool = False
    """Run the first choice through the GPU kernels, in bfloat16, as well."""


class Runner(AccuracyRun):
    """Measures one choice after another of one model."""

    def __init__(self, options: Measure) -> None:
        super().__init__(options, distill_steps=0)
        self.options = options
        self.base = get_scheme(options.scheme)
        self.places, self.choices = find_places(self.full.model, self.base)
        self.sensitivity_seconds = 0.0

    @cached_property
    def losses(self) -> dict[str, dict[str, float]]:
        """What every choice loses."""
        started, o = time.perf_counter(), self.options
        drawn = load_windows(o.calib, self.tokenizer, o.budget_windows, o.budget_length, self.config.seed)
        kept = o.output.with_suffix(f".sensitivity-{drawn.sha256[:8]}.json")
        found = measure_losses(self.source, self.base, drawn.tokens, kept, self.config, self.places, self.choices)
        self.sensitivity_seconds = time.perf_counter() - started
        print(f"{len(self.places)} inputs and caches measured in {self.sensitivity_seconds:.1f} s", flush=True)
        return found

    @cached_property
    def knapsack(self) -> Knapsack:
        """What can be chosen; prints the frontier."""
        found = Knapsack(self.places, self.losses)
        for point in found.frontier():
            print(f"frontier {point.bits:.3f} bits, {point.loss:.4f} nats", flush=True)
        return found

    @cached_property
    def full_perplexity(self) -> float:
        return round(self.texts.score(self.full).perplexity, 4)

    def run(self, choice: str, limit: float | None) -> None:
        """Add the rows of `choice`: budget or max-loss with its limit, or a preset's name."""
        row: dict[str, Any] = {"model": self.options.name, "base": self.base.name, "choice": choice, "limit": limit}
        if self.part.has(RECORD, row):
            return
        if choice == "budget" or choice == "max-loss":
            assert limit is not None
            plan = self.knapsack.solve(limit) if choice == "budget" else self.knapsack.solve_for_loss(limit)
            scheme = build_scheme(self.base, plan, self.places, self.choices)
        else:
            plan, scheme = self.uniform_plan(choice), get_scheme(choice)
        bits = mean_bits(plan, self.places)
        row |= {"bits": round(plan.bits, 3), **{f"bits_{what}": round(b, 3) for what, b in bits.items()}}
        row |= {"predicted": round(plan.loss, 5), "measuring_seconds": round(self.sensitivity_seconds, 1)}
        with scratch(self.options.scratch) as folder:
            report = quantize_source(self.source, scheme, folder / "checkpoint", self.config, self.windows)
            row |= {"seconds": round(float(report.totals["seconds"]), 1), "kv": kv_name(scheme)}
            row |= {"source": self.options.source, **self.calibration(0, ", GPTQ")}
            loaded = self.load(folder / "checkpoint")
            found = self.texts.score(loaded, full=self.full.model)
            row["ppl_fp"] = self.full_perplexity
            self.part.add(RECORD, row | perplexity_keys(loaded, found))
            del loaded
            if self.options.kernels and choice == "budget" and limit == self.options.budgets[0]:
                served = load(str(folder / "checkpoint"), self.options.device, "bfloat16", "auto")
                through = self.texts.score(served)
                self.part.add(RECORD, row | perplexity_keys(served, through) | change_keys(found, through))

    def uniform_plan(self, preset: str) -> Plan:
        """The plan that is `preset` everywhere."""
        linear, cache = get_scheme(preset).default_linear, get_scheme(preset).kv
        chosen = {}
        for place in self.places:
            wanted = cache if place.group is None else linear
            chosen[place.name] = next(name for name, found in self.choices[place.name].items() if found == wanted)
        return plan_of(chosen, self.places, self.losses)


def measure(options: Measure) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the other accuracy scripts
    runner = Runner(options)
    wanted: list[tuple[str, float | None]] = [("budget", bits) for bits in options.budgets]
    wanted += [(name, None) for name in options.uniform] + [("max-loss", nats) for nats in options.max_losses]
    for choice, limit in wanted:
        try:
            runner.run(choice, limit)
        except (AtomError, ValueError, torch.OutOfMemoryError) as error:
            print(f"{options.name}: {choice} {limit or ''} not measured: {error}", flush=True)


def join(options: Join) -> None:
    join_parts(options.parts, [RECORD], options.commit)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "join": Join})
    sys.exit(measure(chosen) if isinstance(chosen, Measure) else join(chosen))
