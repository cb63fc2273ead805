"""What an evaluation reads before there is a model to ask: held-out text, conversations, pairs, tasks. On rank 0.

Users' mistakes are found here, before minutes are spent on a model.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainwright.runtime.errors import DataError, MissingExtra
from trainwright.runtime.megatron.checkpoint import ModelFiles, files_of, find_model
from trainwright.runtime.reading import read_rows
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer
from trainwright.runtime.stages.corpus import read_summary
from trainwright.runtime.stages.heldout import HeldOutText
from trainwright.runtime.stages.measures import (
    Measure,
    Metric,
    NothingHeldOut,
    bigram_figures,
    measure_conversations,
    measure_preferences,
    measure_text,
)
from trainwright.runtime.stages.records import Question, load_conversations, load_preferences, load_questions
from trainwright.runtime.stages.split import SPLIT_FILE, SplitRule
from trainwright.runtime.stages.token_files import TokenFiles
from trainwright.runtime.workspace import StageFolder, Workspace

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Perplexity:
    """Held-out text: the test split of a tokenize stage."""

    inputs: str
    sources: tuple[str, ...]
    baseline: str  # "bigram" | "none"


@dataclass(frozen=True)
class Records:
    """Held-out conversations, or pairs of answers: files or a connector, one of the two."""

    name: str  # of the figures
    path: str
    connector: str
    too_long: str  # what becomes of those longer than the context: "truncate" | "drop" | "split" (conversations alone)


@dataclass(frozen=True)
class Task:
    """Multiple choice: our own JSONL, a YAML file of lm-evaluation-harness, or a connector."""

    name: str
    path: str
    connector: str
    num_fewshot: int  # 0 for a YAML file: as it says


class Preparation:
    """Turns the program's settings into `measures`, by name."""

    def __init__(
        self, workspace: Workspace, folder: StageFolder, models: Sequence[str], length: int, seed: int
    ) -> None:
        """`models`: stages or paths, the evaluated one first; `length`: the context in tokens.

        Raises CheckpointError where one is missing, DataError where they do not share a tokenizer.
        """
        self._workspace, self._folder, self._length, self._seed = workspace, folder, length, seed
        self.models: Mapping[str, Path] = {name: find_model(workspace, name) for name in models}
        files = {name: files_of(path) for name, path in self.models.items()}
        self._files: ModelFiles = files[models[0]]
        for name, those in files.items():
            if those.tokenizer.read_bytes() != self._files.tokenizer.read_bytes():
                raise DataError(
                    f"{models[0]} and {name} have different tokenizers: what they say of a token cannot be compared; compare "
                    "models that were made from one another"
                )
            if _split(those) not in ("", _split(self._files)):
                print(
                    f"warning: {name} was trained by another split of the data than {models[0]}: it may have learnt what it is "
                    f"asked here, and look better than it is; compare models whose {SPLIT_FILE} is the same",
                    flush=True,
                )
        # Every model is asked in the evaluated one's template, so that all are asked the same.
        self._chat = ChatTokenizer(self._files.tokenizer, self._files.chat_template or DEFAULT_TEMPLATE)
        self._all_test = SplitRule(seed=seed, validation=0.0, test=1.0, groups={})
        # Where the model brings no split, nothing is known of what it has seen.
        self._rule = SplitRule.read(self._files.split) if self._files.split else self._all_test
        self.measures: dict[str, Measure] = {}
        self._bigram: HeldOutText | None = None  # text to measure the bigram baseline on

    @property
    def metrics(self) -> dict[str, Metric]:
        return {metric.name: metric for measure in self.measures.values() for metric in measure.metrics}

    def read(
        self,
        perplexity: Perplexity | None,
        conversations: Sequence[Records],
        preferences: Sequence[Records],
        tasks: Sequence[Task],
    ) -> None:
        """Fill `measures`. Raises DataError where something cannot be read or holds nothing, MissingExtra, Unsupported."""
        limit, chat = self._length, self._chat
        if perplexity:
            self._read_text(perplexity)
        for asked in conversations:
            talks = load_conversations(**self._reading(asked))
            with _said_where_nothing_is_held_out():
                measure = measure_conversations(asked.name, talks, chat, limit=limit, too_long=asked.too_long)
                self.measures[f"conversations/{asked.name}"] = measure
        for asked in preferences:
            pairs = load_preferences(**self._reading(asked))
            with _said_where_nothing_is_held_out():
                measure = measure_preferences(asked.name, pairs, chat, limit=limit, too_long=asked.too_long)
                self.measures[f"preferences/{asked.name}"] = measure
        for task in tasks:
            self._read_task(task)
        if not self.measures:
            raise DataError(
                "this evaluation measures nothing: give it held-out text, conversations, preferences or tasks"
            )

    def baselines(self) -> dict[str, dict[str, float]]:
        """Figures of simple models on the very same tokens, under the names of the metrics."""
        return {"bigram": bigram_figures(self._bigram, self._length)} if self._bigram else {}

    def _read_text(self, asked: Perplexity) -> None:
        stage = self._workspace.stage(asked.inputs)
        held = HeldOutText(stage.output, read_summary(stage), asked.sources)
        files = TokenFiles(asked.inputs, held.folder, held.summary)
        size = held.summary["vocab_size"]
        files.check(asked.sources, vocab_size=size, tokenizer=self._files.tokenizer, splits=("validation", "test"))
        held.check_baseline(asked.baseline)
        self.measures["text"] = measure_text(held, self._length)
        self._bigram = held if asked.baseline == "bigram" else None

    def _read_task(self, asked: Task) -> None:
        if find_spec("lm_eval") is None:
            raise MissingExtra(
                f"task {asked.name} is asked by lm-evaluation-harness, which is not installed: pip install 'trainwright[eval]'"
            )
        from trainwright.runtime.stages import harness, tasks  # a second or two, and rank 0 alone needs them

        folder = self._folder.path / "tasks" / asked.name
        if asked.path.endswith(YAML_SUFFIXES):
            root = self._workspace.data_root
            task = tasks.task_of_yaml(
                asked.name,
                root / asked.path,
                num_fewshot=asked.num_fewshot,
                seed=self._seed,
                data_root=root,
                folder=folder,
            )
            ids = [str(number) for number in range(len(task.eval_docs))]
        else:
            questions, examples = self._questions(asked)
            task = tasks.task_of_questions(
                asked.name, questions, examples, num_fewshot=asked.num_fewshot, seed=self._seed, folder=folder
            )
            ids = [question.id for question in questions]
        self.measures[f"tasks/{asked.name}"] = harness.measure_task(
            asked.name, task, ids, self._chat, apply_template=bool(self._files.chat_template), context=self._length
        )

    def _questions(self, asked: Task) -> tuple[list[Question], list[Question]]:
        """(test items, examples to show before them). Of a user's own file every item is a test item."""
        if not asked.path:
            found = load_questions(**self._reading(asked))
            return found.test, found.train
        reading = {**self._reading(asked), "rule": self._all_test}
        aside: Path = reading["set_aside"]
        aside.unlink(missing_ok=True)
        problem: DataError | None = None
        try:
            questions = load_questions(**reading).test
        except DataError as error:
            problem, questions = error, []
        for row in read_rows(aside):  # the first: its line says more than the number of such lines
            raise DataError(
                f"task {asked.name}: {row['file']}, line {row['line']}: {row['reason']}. An evaluation leaves out no item: each "
                'line is {"query": "...", "choices": ["...", "..."], "answer": 0}'
            )
        if problem:
            raise problem
        return questions, []

    def _reading(self, asked: Records | Task) -> dict[str, Any]:
        return {
            "path": asked.path,
            "connector": asked.connector,
            "data_root": self._workspace.data_root,
            "rule": self._rule,
            "set_aside": self._folder.path / "set_aside" / f"{asked.name}.jsonl",
        }


@contextlib.contextmanager
def _said_where_nothing_is_held_out() -> Iterator[None]:
    """A small set of a tuning stage's records must not cost the rest of an evaluation; a gate on its figures still does."""
    try:
        yield
    except NothingHeldOut as nothing:
        print(f"warning: not measured: {nothing}", flush=True)


def _split(files: ModelFiles) -> str:
    """What was held out of a model's data; "" where it is not known."""
    return files.split.read_text(encoding="utf-8") if files.split else ""
