"""Do `atom` and lm-eval's own `hf` backend find the same numbers for one full-precision model?

Runs both in float32 on the CPU and writes the record lm-eval-agreement: every metric side by side, and the largest
difference between the log likelihoods (nats) that the two give to one request.

    python benchmarks/eval_agreement.py MODEL --tasks piqa,arc_easy --limit 40 [--include-path DIR]
"""

import argparse
from pathlib import Path
from typing import Any

from atom.eval.lm import AtomLM
from atom.eval.tasks import prepare_tasks
from atom.records import write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="piqa,arc_easy")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--include-path")
    parser.add_argument("--name", help="what the record calls the model; default its last path component")
    options = parser.parse_args()

    from lm_eval.models.huggingface import HFLM

    ours = _run(AtomLM(options.model, device="cpu", dtype="float32"), options)
    theirs = _run(HFLM(pretrained=options.model, device="cpu", dtype="float32", batch_size=8), options)
    rows = []
    for task, scores in ours["results"].items():
        samples = ours["samples"][task]
        furthest = max(map(_difference, samples, theirs["samples"][task]))
        for key, value in scores.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                row = {"task": task, "metric": metric, "atom": value, "hf": theirs["results"][task][key]}
                row |= {"documents": len(samples), "max_difference": float(f"{furthest:.2g}")}
                rows.append({"model": options.name or Path(options.model).name, **row})
                print(row)
    print(write_record("lm-eval-agreement", rows))


def _run(lm: Any, options: argparse.Namespace) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = prepare_tasks(options.tasks.split(","), options.include_path).loaded["tasks"].values()
    none = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[*tasks], task_manager=none, limit=options.limit, bootstrap_iters=0)


def _difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest difference of log likelihood over the requests of one document; infinite if is_greedy differs."""
    largest = 0.0
    for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
        (p, is_greedy), (q, other) = ((float(v[0]), v[1]) if isinstance(v, tuple) else (float(v), None) for v in (x, y))
        largest = max(largest, abs(p - q) if str(is_greedy) == str(other) else float("inf"))
    return largest


if __name__ == "__main__":
    main()
