"""Multiple-choice tasks for lm-evaluation-harness: our own JSONL, or lm-eval's YAML files, both on local data.

Rank 0 alone imports this module: lm-eval and what it needs take seconds.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.records import Question
from trainwright.runtime.workspace import write_atomically

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # readers that come with `datasets`
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


def task_of_questions(
    name: str,
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    num_fewshot: int,
    seed: int,
    folder: Path,
) -> ConfigurableTask:
    """The task of asking `questions`, with `num_fewshot` of `examples` (none: other questions) before each.

    Writes what lm-eval reads, and its cache, to `folder`. Raises DataError where there are too few examples.
    """
    splits = {"test": questions} | ({"examples": examples} if num_fewshot and examples else {})
    available = len(examples) or len(questions) - 1
    if num_fewshot > available:
        raise DataError(f"task {name}: num_fewshot {num_fewshot}, and there are {available} other questions to show")
    shutil.rmtree(folder, ignore_errors=True)  # what another evaluation left, or a killed one half-way
    files = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in files.items():
        write_atomically(path, "".join(_line(question) for question in splits[split]))
    config = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        "test_split": "test",
        "fewshot_split": list(files)[-1],
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    return _build(name, config, str(files["test"]), num_fewshot, seed, folder)


def task_of_yaml(
    name: str, path: Path, *, num_fewshot: int, seed: int, data_root: Path, folder: Path
) -> ConfigurableTask:
    """The task of one of lm-eval's YAML files. Relative data files are meant from `data_root`; `num_fewshot` 0: the file's own.

    Raises DataError where the file or its data cannot be read, the data is not on this machine, the output is of another
    type than multiple_choice, or a field that the file names is not there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        config = load_yaml(path)
    except Exception as error:  # a YAML file may also run its author's code
        raise DataError(f"task {name}: {path} cannot be read: {_first_line(error)}") from error
    if config.get("output_type") != "multiple_choice":
        raise DataError(
            f"task {name}: {path} says output_type: {config.get('output_type', 'generate_until (the default)')}; this "
            "evaluation asks tasks with output_type: multiple_choice"
        )
    if "custom_dataset" not in config:
        source = config.get("dataset_path")
        if source not in LOCAL_FORMATS:
            raise DataError(
                f"task {name}: {path} says dataset_path: {source}, which is to be fetched from a hub; give local data: "
                f"dataset_path one of {', '.join(LOCAL_FORMATS)}, and dataset_kwargs: {{data_files: ...}}"
            )
        kwargs = dict(config.get("dataset_kwargs") or {})
        config["dataset_kwargs"] = {**kwargs, "data_files": _below(data_root, kwargs.get("data_files"))}
    shots = num_fewshot or config.get("num_fewshot") or 0
    return _build(name, config, str(path), shots, seed, folder)


def _build(
    name: str, config: Mapping[str, Any], place: str, num_fewshot: int, seed: int, folder: Path
) -> ConfigurableTask:
    """Make the task and look at every item. Raises DataError."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    if "custom_dataset" not in config:
        kwargs["cache_dir"] = str(folder / "cache")
    settings = {**config, "task": name, "dataset_kwargs": kwargs, "num_fewshot": num_fewshot, "metric_list": METRICS}
    task = ConfigurableTask.__new__(ConfigurableTask)  # in two steps: where the second fails, `task` holds the data
    try:
        task.__init__(config=settings)
        task.set_fewshot_seed(seed)
        for number, doc in enumerate(task.eval_docs):
            problem = _problem(task, doc)
            if problem:
                raise DataError(f"task {name}: {place}: item {number}: {problem}{_fields(task)}")
    except DataError:
        raise
    except Exception as error:  # lm-eval, datasets and jinja2 raise what they like, and each means: this data, not ours
        raise DataError(f"task {name}: {place} does not fit its data: {_first_line(error)}{_fields(task)}") from error
    return task


def _problem(task: ConfigurableTask, doc: Mapping[str, Any]) -> str:
    text, choices, answer = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
    if not isinstance(text, str) or not text.strip():
        return f"doc_to_text {task.config.doc_to_text!r} gives {text!r}, not a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return f"doc_to_choice {task.config.doc_to_choice!r} gives {choices!r}, not two or more texts"
    right = range(len(choices)) if isinstance(answer, int) else choices
    if answer not in right:
        return (
            f"doc_to_target {task.config.doc_to_target!r} gives {answer!r}, not a number from 0 to {len(choices) - 1}"
        )
    return ""


def _fields(task: ConfigurableTask) -> str:
    """What the data holds, where it was read."""
    splits: Mapping[str, Any] = getattr(task, "dataset", None) or {}
    described = [f"{split}: {', '.join(data.column_names)}" for split, data in splits.items()]
    return f"; its fields are {'; '.join(described)}" if described else ""


def _line(question: Question) -> str:
    record = {"query": question.prompt, "choices": list(question.choices), "answer": question.answer}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _below(root: Path, files: Any) -> Any:
    """`files` (a path, a list, or either by split) with relative paths below `root`."""
    if isinstance(files, Mapping):
        return {split: _below(root, value) for split, value in files.items()}
    if isinstance(files, Iterable) and not isinstance(files, str):
        return [_below(root, value) for value in files]
    return str(root / files) if isinstance(files, str) else files


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
