"""The pairs that real docstrings give, under the split that ingest makes: how many, of what kind, and nothing leaks."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from trainwright.runtime.stages.connectors import docstrings, parse_module, stdlib_files, stdlib_group
from trainwright.runtime.stages.records import (
    Conversation,
    Preference,
    Question,
    Records,
    load_conversations,
    load_preferences,
    load_questions,
)
from trainwright.runtime.stages.repeats import normalise
from trainwright.runtime.stages.split import SplitRule
from trainwright.runtime.stages.stdlib_items import summarise

INGEST = """
from trainwright.runtime.stages import ingest

if __name__ == "__main__":
    ingest.run(
        stage="ingest",
        sources=(
            ingest.Source(name="code", connector="python-stdlib:code"),
            ingest.Source(name="prose", connector="python-stdlib:prose"),
        ),
        split=ingest.Split(validation=0.04, test=0.12, seed=1234),
    )
"""
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> SplitRule:
    """What ingest decides for specs/tiny.yaml."""
    bundle = tmp_path_factory.mktemp("bundle")
    program = bundle / "01_ingest.py"
    program.write_text(INGEST)
    environment = {name: value for name, value in os.environ.items() if name != "TRAINWRIGHT_WORK"}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return SplitRule.read(bundle / "work/ingest/output/split.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aside")


@pytest.fixture(scope="module")
def conversations(rule: SplitRule, folder: Path) -> Records[Conversation]:
    aside = folder / "conversations.jsonl"
    return load_conversations(connector="python-stdlib:questions", data_root=folder, rule=rule, set_aside=aside)


@pytest.fixture(scope="module")
def preferences(rule: SplitRule, folder: Path) -> Records[Preference]:
    aside = folder / "preferences.jsonl"
    return load_preferences(connector="python-stdlib:preferences", data_root=folder, rule=rule, set_aside=aside)


@pytest.fixture(scope="module")
def questions(rule: SplitRule, folder: Path) -> Records[Question]:
    aside = folder / "questions.jsonl"
    return load_questions(connector="python-stdlib:choices", data_root=folder, rule=rule, set_aside=aside)


def test_there_are_enough_of_each_in_each_split_and_all_are_accounted_for(
    conversations: Records[Conversation], preferences: Records[Preference], questions: Records[Question], folder: Path
) -> None:
    for split, fewest in (("train", 3000), ("validation", 100), ("test", 500)):
        ids = [[record.id for record in getattr(records, split)] for records in (conversations, preferences, questions)]
        assert len(ids[0]) >= fewest
        assert set(ids[0]) == set(ids[1]) == set(ids[2]), "the stages are about the same items"
        assert all(len(set(those)) == len(those) for those in ids)
    for records, name in ((conversations, "conversations"), (preferences, "preferences"), (questions, "questions")):
        counts = records.counts
        assert counts["kept"] == sum(len(getattr(records, split)) for split in SPLITS)
        assert counts["in"] == sum(count for reason, count in counts.items() if reason != "in")
        aside = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        listed = Counter(json.loads(line)["reason"] for line in aside)
        assert listed == {reason.split(": ", 1)[1]: n for reason, n in counts.items() if reason not in ("in", "kept")}


def test_no_held_out_answer_stands_in_training_text(
    conversations: Records[Conversation], questions: Records[Question], rule: SplitRule
) -> None:
    trained = " ".join(
        normalise(docstrings(parse_module(path.read_text(encoding="utf-8"))))
        for path, name in stdlib_files()
        if rule.of(stdlib_group(name), "") == "train"
    )
    said = [normalise(conversation.messages[1].content) for conversation in conversations.train]
    held = [conversation for split in (conversations.validation, conversations.test) for conversation in split]
    assert not [text for text in (normalise(one.messages[1].content) for one in held) if f" {text} " in f" {trained} "]
    everything = said + [normalise(one.messages[1].content) for one in held]
    assert len(set(everything)) == len(everything)
    for split in SPLITS:
        groups = {record.group for record in getattr(conversations, split)}
        assert {rule.groups[group] for group in groups} == {split}
        assert len(groups) >= 5
        summaries = {record.messages[1].content for record in getattr(conversations, split)}
        dropped = 5  # a near-repeat of another split's may still be a wrong choice of its own
        wrong = {choice for record in getattr(questions, split) for choice in record.choices}
        assert len(wrong - summaries) <= dropped


def test_questions_name_what_is_really_there(conversations: Records[Conversation]) -> None:
    """Against the living objects, not the parser that made them."""
    by_id = {record.id: record for record in conversations.train + conversations.validation + conversations.test}
    for name, module, call in (
        ("textwrap.indent", "textwrap", "indent(text, prefix, predicate)"),
        ("heapq.merge", "heapq", "merge(*iterables, key, reverse)"),
        ("fractions.Fraction.limit_denominator", "fractions", "Fraction.limit_denominator(max_denominator)"),
        ("json.decoder.JSONDecodeError", "json.decoder", "JSONDecodeError(msg, doc, pos)"),
        ("fractions.Fraction.from_float", "fractions", "Fraction.from_float(f)"),
        ("tracemalloc.Snapshot.load", "tracemalloc", "Snapshot.load(filename)"),
    ):
        question, answer = by_id[name].messages[:2]
        assert f"`{call}`" in question.content
        assert f"`{module}`" in question.content
        living = importlib.import_module(module)
        for part in name.removeprefix(f"{module}.").split("."):
            living = getattr(living, part)
        assert " ".join((inspect.getdoc(living) or "").split()).startswith(answer.content)
        assert 4 <= len(answer.content.split()) <= 30
    wordings = Counter(record.messages[0].content.split("`")[0] for record in by_id.values())
    assert len(wordings) == 9
    assert min(wordings.values()) > 100


def test_one_conversation_in_eight_has_a_second_question_that_the_first_answers(
    conversations: Records[Conversation],
) -> None:
    longer = [record for record in conversations.train if len(record.messages) > 2]
    assert 0.1 < len(longer) / len(conversations.train) < 0.15
    asked: Counter[str] = Counter()
    for record in longer:
        first, _, question, answer = (message.content for message in record.messages)
        asked[question] += 1
        named = answer.split("`")[1::2]
        assert named
        assert all(name in first for name in named)
    assert set(asked) == {"Which arguments does it take?", "Which module is it in?"}


def test_rejected_answers_are_of_three_kinds(preferences: Records[Preference]) -> None:
    for split in SPLITS:
        records: list[Preference] = getattr(preferences, split)
        kinds = Counter(record.kind for record in records)
        assert abs(kinds["other"] / len(records) - 0.5) < 0.07
        assert abs(kinds["truncated"] / len(records) - 0.25) < 0.07
        assert kinds.total() == kinds["other"] + kinds["truncated"] + kinds["shuffled"]
        chosen = {record.chosen for record in records}
        away = []
        for record in records:
            assert record.chosen != record.rejected
            if record.kind == "truncated":
                assert record.chosen.startswith(record.rejected)
                assert len(record.rejected) < 0.95 * len(record.chosen)
            elif record.kind == "shuffled":
                assert sorted(record.rejected.split()) == sorted(record.chosen.split())
            else:
                assert record.rejected in chosen or split != "train"
                away.append(abs(len(record.rejected) - len(record.chosen)) / len(record.chosen))
        assert sorted(away)[len(away) * 9 // 10] < 0.25, "of like length"


def test_the_right_choice_is_at_no_place_and_of_no_length_in_particular(questions: Records[Question]) -> None:
    records = questions.test
    places = Counter(record.answer for record in records)
    assert all(abs(places[place] / len(records) - 0.25) < 0.06 for place in range(4))
    ranks = Counter[int]()
    for record in records:
        sizes, right = [len(choice) for choice in record.choices], len(record.choices[record.answer])
        first, ties = sum(size < right for size in sizes), sizes.count(right)
        for rank in range(first, first + ties):
            ranks[rank] += 12 // ties
    assert all(abs(ranks[rank] / 12 / len(records) - 0.25) < 0.06 for rank in range(4)), "of any length among the four"
    for record in records:
        assert len(set(record.choices)) == 4
        said = set(normalise(record.choices[record.answer]).split())
        for place, choice in enumerate(record.choices):
            words = set(normalise(choice).split())
            assert place == record.answer or len(words & said) < 0.5 * len(words | said)


def test_the_same_library_and_split_give_the_same_records(
    preferences: Records[Preference], rule: SplitRule, tmp_path: Path
) -> None:
    """In another process, whose hashes of text are others."""
    rule.write(tmp_path / "split.json")
    program = f"""
from pathlib import Path
from trainwright.runtime.stages.records import load_preferences
from trainwright.runtime.stages.split import SplitRule
folder = Path({str(tmp_path)!r})
records = load_preferences(connector="python-stdlib:preferences", data_root=folder,
                           rule=SplitRule.read(folder / "split.json"), set_aside=folder / "aside.jsonl")
print(repr((records.test, records.counts)))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == repr((preferences.test, preferences.counts))


def test_a_summary_is_the_first_sentence() -> None:
    assert summarise("Return x.  Then more.\n\nAnd more.") == "Return x."
    assert summarise("Return the version e.g. 3.11\nof it, please! More") == "Return the version e.g."
    assert summarise("\n  No end\n  in sight\n\nNext.") == "No end in sight"
    assert ast.get_docstring(parse_module("'A doc.'")) == "A doc."
