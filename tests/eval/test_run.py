"""`evaluate` from end to end on a tiny model, with a task of our own, and through lm-eval's command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atom.circumstances import CHECKOUT
from atom.errors import CheckpointError, UnsupportedError
from atom.eval.results import EvalResult
from atom.eval.run import EvalConfig, evaluate

from .conftest import SENTENCES

TASK = """
task: animals_local
dataset_path: json
dataset_kwargs:
  data_files: {train: data/train.jsonl, test: data/test.jsonl}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tasks/animals.yaml, whose data lie in data/ beside tasks/."""
    root = tmp_path_factory.mktemp("offline")
    for name in ("tasks", "data"):
        (root / name).mkdir()
    (root / "tasks" / "animals.yaml").write_text(TASK)
    rows = [
        {"question": f"who jumps over {i} {noun}?", "choices": ["fox", "dog", "four bits"], "label": i % 3}
        for i, noun in enumerate(["lazy dogs", "brown foxes", "channels", "texts"] * 3)
    ]
    for split in ("train", "test"):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "tasks"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_texts_and_tasks(model_dir: Path, text_file: Path, task_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    output = tmp_path / "result.json"
    config = EvalConfig(
        model=str(model_dir),
        ppl=(f"wikitext2={text_file}", str(text_file)),
        tasks=("animals_local",),
        limit=7,
        window=16,
        device="cpu",
        include_path=str(task_dir),
        num_fewshot=1,
        output=str(output),
    )
    seen: list[tuple[str, int, int]] = []
    result = evaluate(config, progress=lambda text, done, count, _: seen.append((text, done, count)))
    assert EvalResult.read(output) == result
    assert [p.text for p in result.perplexity] == ["wikitext2", "story"]
    assert result.perplexity[0].windows == 7 and seen[-1] == ("story", 7, 7)
    (task,) = result.tasks
    assert (task.task, task.version, task.num_fewshot, task.samples) == ("animals_local", "2.0", 1, 7)
    name, metric = task.primary
    assert name == "acc" and set(task.metrics) == {"acc", "acc_norm"}
    assert metric.per_sample is not None and len(metric.per_sample) == 7
    assert metric.value == pytest.approx(sum(metric.per_sample) / 7) and metric.stderr is not None
    assert (result.scheme, result.path, result.device, result.dtype) == (None, "reference", "cpu", "float32")
    assert result.config["limit"] == 7 and "lm_eval" in result.versions and result.seed == 1234


def test_numbers_equal_lm_evals_own_backend(model_dir: Path, task_dir: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from atom.eval.tasks import prepare_tasks

    config = EvalConfig(
        str(model_dir), tasks=("animals_local",), device="cpu", include_path=str(task_dir), num_fewshot=2
    )
    (ours,) = evaluate(config).tasks
    prepared = prepare_tasks(["animals_local"], str(task_dir))
    hf = HFLM(pretrained=str(model_dir), device="cpu", dtype="float32", batch_size=4)
    no_more = TaskManager(include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        hf, tasks=[*prepared.loaded["tasks"].values()], num_fewshot=2, task_manager=no_more
    )
    for name, metric in ours.metrics.items():
        assert metric.value == theirs["results"]["animals_local"][f"{name},none"]
        assert metric.stderr == pytest.approx(theirs["results"]["animals_local"][f"{name}_stderr,none"])


@pytest.mark.slow
def test_lm_evals_own_command_line(model_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    command = [
        *(sys.executable, "-m", "atom.eval.lm_eval", "--model", "atom"),
        *("--model_args", f"pretrained={model_dir}", "--include_path", str(task_dir)),
        *("--tasks", "animals_local", "--limit", "4", "--output_path", str(tmp_path / "out")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=task_dir.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "animals_local" in done.stdout and "acc_norm" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert (config["model"], config["model_path"], config["model_scheme"]) == ("atom", "reference", None)


def test_what_is_wrong_is_said(model_dir: Path, text_file: Path, task_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to measure; give --ppl wikitext2"):
        EvalConfig("m")
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1, or left out"):
        EvalConfig("m", ppl=("wikitext2",), limit=0)
    with pytest.raises(ValueError, match="--kl-to measures on texts, and none was given"):
        EvalConfig("m", tasks=("piqa",), kl_to="n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt holds no text"):
        evaluate(EvalConfig("never loaded", ppl=(str(empty),)))
    with pytest.raises(FileNotFoundError, match=r"missing.txt does not exist"):
        evaluate(EvalConfig("never loaded", ppl=(str(tmp_path / "missing.txt"),)))
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens_map.json"))
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate(EvalConfig(str(bare), ppl=(str(text_file),), device="cpu"))


def test_what_is_wrong_with_tasks_is_said(task_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="holds no task files; give a folder with lm-eval"):
        evaluate(EvalConfig("never loaded", tasks=("animals_local",), include_path=str(tmp_path)))
    (tmp_path / "orphan.yaml").write_text(TASK.replace("data/", "nowhere/").replace("animals", "orphan"))
    with pytest.raises(UnsupportedError, match=r"data of task orphan_local could not be loaded .*--include-path DIR"):
        evaluate(EvalConfig("never loaded", tasks=("orphan_local",), include_path=str(tmp_path)))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("atom.eval.tasks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"--tasks needs the package lm_eval .*pip install 'atom-serving"):
        evaluate(EvalConfig("never loaded", tasks=("piqa",)))


def test_sentences_reach_the_tokenizer_whole() -> None:
    from .conftest import make_tokenizer

    tokenizer = make_tokenizer(adds_bos=False)
    assert [tokenizer.decode(tokenizer.encode(sentence)) for sentence in SENTENCES] == SENTENCES
