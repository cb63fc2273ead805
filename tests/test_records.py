"""Records from users' files: what is read, what is set aside and why, where each goes, and what is dropped."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.records import (
    Conversation,
    Message,
    Preference,
    Question,
    load_conversations,
    load_preferences,
    load_questions,
)
from trainwright.runtime.stages.repeats import find_repeated, normalise
from trainwright.runtime.stages.split import SplitRule

ALL_TRAIN = SplitRule(seed=1, validation=0.0, test=0.0, groups={})
BY_GROUP = SplitRule(seed=1, validation=0.0, test=0.0, groups={"t": "train", "v": "validation", "x": "test"})


def write(path: Path, *records: Any) -> Path:
    """A JSON Lines file; bytes are lines as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    content = b"".join(line + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def balance(counts: dict[str, int]) -> bool:
    return counts["in"] == sum(count for name, count in counts.items() if name != "in")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def talk(*turns: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


GOOD_CONVERSATIONS: list[tuple[Any, tuple[tuple[str, str], ...]]] = [
    (talk(user("q"), assistant("a")), (("user", "q"), ("assistant", "a"))),
    (
        talk({"role": "system", "content": "s"}, user("q"), assistant(" a\n"), user("r"), assistant("b")),
        (("system", "s"), ("user", "q"), ("assistant", " a\n"), ("user", "r"), ("assistant", "b")),
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        (("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        (("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    ({"prompt": "q", "completion": "a"}, (("user", "q"), ("assistant", "a"))),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, (("user", "q"), ("assistant", "a"))),
]

BAD_CONVERSATIONS: list[tuple[Any, str]] = [
    (talk(), "no messages"),
    ({"messages": None}, "messages are neither a text nor a list"),
    (talk(user("q")), "no turn of the assistant's"),
    (talk({"role": "system", "content": "s"}), "the first turn is not the user's"),
    (talk(assistant("a"), user("q"), assistant("a")), "the first turn is not the user's"),
    (talk(user("q"), user("r"), assistant("a")), "two turns of one role in a row"),
    (talk(user("q"), assistant("a"), user("r")), "the last turn is not the assistant's"),
    (talk(user("q"), {"role": "system", "content": "s"}, assistant("a")), "a system message after the first turn"),
    (talk(user("q"), {"role": "tool", "content": "t"}), "unknown role 'tool'; known are system, user, assistant"),
    ({"conversations": [{"from": "bing", "value": "a"}]}, "unknown role 'bing'; known are system, user, assistant"),
    (talk({"role": ["user"], "content": "q"}), "unknown role ['user']; known are system, user, assistant"),
    (talk(user("q"), assistant(" \n")), "a message is empty"),
    (talk(user("q"), {"role": "assistant", "content": None}), "a message whose content is not a text"),
    (talk(user("q"), {"role": "assistant"}), 'a message without "role" and "content"'),
    (talk("q", "a"), 'a message without "role" and "content"'),
    ({"text": "t"}, 'no "messages", "conversations", or "prompt" and "completion"; its fields are text'),
    ([talk(user("q"), assistant("a"))], "a JSON list: write one object a line"),
    ("q", "no JSON object"),
    (b'{"messages": [', "invalid JSON"),
    (b'{"messages": "\xff"}', "invalid UTF-8"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid UTF-8"),
]


def test_conversations_are_read_in_every_usual_form(tmp_path: Path) -> None:
    records = [record for record, _ in GOOD_CONVERSATIONS]
    write(tmp_path / "chat/a.jsonl", *records[:4], b"", b"  ")
    write(tmp_path / "chat/b.jsonl.gz", {**records[4], "id": 7, "group": "g"}, {**records[5], "metadata": {"group": 3}})
    found = load_conversations(
        path="chat/*", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "out/set_aside.jsonl"
    )
    messages = [tuple((message.role, message.content) for message in record.messages) for record in found.train]
    assert messages == [expected for _, expected in GOOD_CONVERSATIONS]
    assert [record.id for record in found.train][3:] == ["chat/a.jsonl:4", "7", "chat/b.jsonl.gz:2"]
    assert [record.group for record in found.train][3:] == [None, "g", "3"]
    assert found.counts == {"in": 6, "kept": 6}
    assert (tmp_path / "out/set_aside.jsonl").read_text() == ""


def test_reasons_that_are_all_different_are_counted_together(tmp_path: Path) -> None:
    strange = [talk({"role": f"robot{n}", "content": "q"}) for n in range(30)]
    write(tmp_path / "chat.jsonl", *strange, talk(user("q")), talk(user("q")), talk(user("q"), assistant("a")))
    found = load_conversations(
        path="chat.jsonl", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "aside.jsonl"
    )
    assert found.counts["set aside: for other reasons"] == 11
    assert found.counts["set aside: no turn of the assistant's"] == 2, "the most common by itself"
    assert len(found.counts) == 2 + 20 + 1
    assert sum(number for reason, number in found.counts.items() if reason != "in") == found.counts["in"] == 33
    assert len(rows(tmp_path / "aside.jsonl")) == 32


def test_conversations_that_cannot_be_used_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    good = talk(user("q"), assistant("a"))
    write(tmp_path / "chat.jsonl", good, *(record for record, _ in BAD_CONVERSATIONS))
    found = load_conversations(
        path="chat.jsonl", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "aside.jsonl"
    )
    assert found.train == [Conversation((Message("user", "q"), Message("assistant", "a")), "chat.jsonl:1", None)]
    aside = rows(tmp_path / "aside.jsonl")
    assert [(row["file"], row["line"], row["reason"]) for row in aside] == [
        ("chat.jsonl", line, reason) for line, (_, reason) in enumerate(BAD_CONVERSATIONS, start=2)
    ]
    assert json.loads(aside[0]["content"]) == {"messages": []}
    assert found.counts['set aside: a message without "role" and "content"'] == 2
    assert found.counts["in"] == len(BAD_CONVERSATIONS) + 1
    assert found.counts["kept"] == 1
    assert balance(found.counts)


GOOD_PREFERENCES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"prompt": "q", "chosen": "a", "rejected": "b", "kind": "other"}, ("q",), "other"),
    ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, ("q",), ""),
    ({"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, ("q",), ""),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, ("q",), ""),
    (
        {
            "chosen": [user("o"), assistant("p"), user("q"), assistant("a")],
            "rejected": [user("o"), assistant("p"), user("q"), assistant("b")],
        },
        ("o", "p", "q"),
        "",
    ),
]

BAD_PREFERENCES: list[tuple[Any, str]] = [
    ({"prompt": "q", "chosen": "same", "rejected": " same\n"}, "chosen and rejected are identical"),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]}, "chosen and rejected are identical"),
    ({"prompt": "q", "chosen": "", "rejected": "b"}, "a message is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "a message is empty"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "a message is empty"),
    ({"prompt": "q", "chosen": 1, "rejected": "b"}, "messages are neither a text nor a list"),
    ({"prompt": {"role": "user"}, "chosen": "a", "rejected": "b"}, "messages are neither a text nor a list"),
    ({"prompt": "q", "chosen": "a"}, 'no "chosen" and "rejected"; its fields are prompt, chosen'),
    ({"chosen": "a", "rejected": "b"}, 'no "prompt", and the answers have no common beginning that is one'),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, 'no "prompt", and the answers have no common beginning that is one'),
    (
        {"prompt": "q", "chosen": [user("q")], "rejected": [assistant("b")]},
        "chosen and rejected are not one answer of the assistant's each",
    ),
    (
        {"chosen": [user("q"), assistant("a"), user("r"), assistant("c")], "rejected": [user("q"), assistant("b")]},
        "chosen and rejected are not one answer of the assistant's each",
    ),
    ({"prompt": [user("q"), assistant("a")], "chosen": "b", "rejected": "c"}, "two turns of one role in a row"),
]  # fmt: skip


def test_preferences_as_texts_and_as_messages_with_and_without_a_prompt(tmp_path: Path) -> None:
    write(
        tmp_path / "pairs.jsonl",
        *(record for record, _, _ in GOOD_PREFERENCES),
        *(record for record, _ in BAD_PREFERENCES),
    )
    found = load_preferences(path="pairs.jsonl", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "aside.jsonl")
    read = [(tuple(message.content for message in record.prompt), record.kind) for record in found.train]
    assert read == [(prompt, kind) for _, prompt, kind in GOOD_PREFERENCES]
    assert {(record.chosen, record.rejected) for record in found.train} == {("a", "b")}
    assert {record.prompt[-1].role for record in found.train} == {"user"}
    reasons = [(row["line"], row["reason"]) for row in rows(tmp_path / "aside.jsonl")]
    assert reasons == [
        (line, reason) for line, (_, reason) in enumerate(BAD_PREFERENCES, start=len(GOOD_PREFERENCES) + 1)
    ]
    assert balance(found.counts)


BAD_QUESTIONS: list[tuple[Any, str]] = [
    ({"question": "q", "options": ["a", "b"]}, 'no "query", "choices" and "answer"; its fields are question, options'),
    ({}, 'no "query", "choices" and "answer"; it is empty'),
    ({"query": "", "choices": ["a", "b"], "answer": 0}, '"query" is not a text'),
    ({"query": "q", "choices": "ab", "answer": 0}, '"choices" is not a list of texts'),
    ({"query": "q", "choices": ["a", 2], "answer": 0}, '"choices" is not a list of texts'),
    ({"query": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
    ({"query": "q", "choices": ["a", "b", "a "], "answer": 0}, "a choice occurs twice"),
    ({"query": "q", "choices": ["a", "b"], "answer": 2}, "answer out of range: choices are numbered from 0"),
    ({"query": "q", "choices": ["a", "b"], "answer": -1}, "answer out of range: choices are numbered from 0"),
    ({"query": "q", "choices": ["a", "b"], "answer": "A"}, '"answer" is not the number of a choice'),
    ({"query": "q", "choices": ["a", "b"], "answer": True}, '"answer" is not the number of a choice'),
]


def test_questions(tmp_path: Path) -> None:
    good = {"query": "q", "choices": ["a", "b", "c"], "answer": 2, "id": "one"}
    write(tmp_path / "mc.jsonl", *(record for record, _ in BAD_QUESTIONS), good)
    found = load_questions(path="mc.jsonl", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "aside.jsonl")
    assert found.train == [Question("q", ("a", "b", "c"), 2, "one", None)]
    assert [row["reason"] for row in rows(tmp_path / "aside.jsonl")] == [reason for _, reason in BAD_QUESTIONS]
    assert balance(found.counts)


def test_a_source_without_a_usable_record_says_why_and_what_a_line_looks_like(tmp_path: Path) -> None:
    def load(path: str = "", connector: str = "") -> None:
        load_preferences(
            path=path, connector=connector, data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "a.jsonl"
        )

    write(tmp_path / "pairs.jsonl", *(record for record, _ in BAD_PREFERENCES[:3]), b"{")
    with pytest.raises(
        DataError,
        match=r"no usable preferences in 'p\*\.jsonl' in .*: 1 a message is empty, 2 chosen and rejected are identical, "
        r'1 invalid JSON; .*a\.jsonl shows them\. A line is {"prompt": ',
    ):
        load("p*.jsonl")
    write(tmp_path / "pairs.jsonl", b"")
    with pytest.raises(DataError, match="only blank lines"):
        load("pairs.jsonl")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(DataError, match=r"1 its name does not end in \.jsonl"):
        load("pairs.csv")
    (tmp_path / "pairs.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="1 damaged gzip file"):
        load("pairs.jsonl.gz")
    with pytest.raises(DataError, match=r"no file matches 'none/\*' in "):
        load("none/*")
    with pytest.raises(DataError, match=r"no connector 'python-stdlib:questions' for preferences; there is "):
        load(connector="python-stdlib:questions")


def test_records_go_where_their_group_is_and_all_answers_to_one_prompt_stay_together(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        talk(user("1"), assistant("a"), group="t"),
        talk(user("1"), assistant("b"), metadata={"group": "v"}),
        talk(user("1"), assistant("c"), group="x"),
        *(talk(user(f"{number % 100}"), assistant(f"{number}"), user("and?"), assistant("a")) for number in range(300)),
    )
    rule = SplitRule(seed=1, validation=0.2, test=0.3, groups=BY_GROUP.groups)
    found = load_conversations(path="a.jsonl", data_root=tmp_path, rule=rule, set_aside=tmp_path / "aside.jsonl")
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    assert {name: part[0].messages[1].content for name, part in parts.items()} == {
        "train": "a",
        "validation": "b",
        "test": "c",
    }
    prompts = [{record.messages[0].content for record in part[1:]} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
    assert [len(part) - 1 for part in parts.values()] == [3 * len(those) for those in prompts]
    assert 35 < len(prompts[0]) < 65
    assert len(prompts[1]) < len(prompts[2])

    write(tmp_path / "p.jsonl", *({"prompt": f"{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(100)))
    pairs = load_preferences(path="p.jsonl", data_root=tmp_path, rule=rule, set_aside=tmp_path / "aside.jsonl")
    assert {record.prompt[0].content for record in pairs.test} == prompts[2], "a prompt has one split in all stages"
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, user(f"{n}")], "chosen": f"yes {n}", "rejected": "no"} for n in range(100)]
    write(tmp_path / "s.jsonl", *rows)
    pairs = load_preferences(path="s.jsonl", data_root=tmp_path, rule=rule, set_aside=tmp_path / "aside.jsonl")
    assert {record.prompt[1].content for record in pairs.test} == prompts[2], "whatever the system message"


LONG = "It returns the number of items that a container holds, and raises a TypeError for what has no length at all."
SIMILAR = LONG.replace("items", "elements").upper()
OTHER = LONG.replace("number of items", "sum of all the positive items").replace("container", "list or tuple")


def test_a_held_out_answer_that_an_earlier_split_nearly_repeats_is_dropped(tmp_path: Path) -> None:
    def pair(prompt: str, chosen: str, group: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": chosen, "rejected": "no", "group": group}

    write(
        tmp_path / "p.jsonl",
        pair("q1", LONG, "t"),
        pair("q2", SIMILAR, "x"),  # repeats q1
        pair("q3", OTHER, "x"),
        pair("q4", "Yes.", "t"),
        pair("q5", "Yes.", "v"),  # short: only with the same prompt
        pair("q4", " yes", "v"),
        pair("q6", "Some answer that only the validation split has, and that is long enough.", "v"),
        pair("q7", "Some answer that only the validation split has, and that is long enough!", "x"),
        pair("q8", LONG, "t"),  # within a split nothing is dropped
        pair("q9", OTHER, "x"),
    )
    found = load_preferences(path="p.jsonl", data_root=tmp_path, rule=BY_GROUP, set_aside=tmp_path / "aside.jsonl")
    prompts = [[record.prompt[0].content for record in part] for part in (found.train, found.validation, found.test)]
    assert prompts == [["q1", "q4", "q8"], ["q5", "q6"], ["q3", "q9"]]
    reason = "nearly repeats the answer of a record in an earlier split"
    assert found.counts == {"in": 10, "kept": 7, f"dropped: {reason}": 3}
    assert {(row["line"], row["reason"]) for row in rows(tmp_path / "aside.jsonl")} == {(n, reason) for n in (2, 6, 8)}


vocabulary = st.lists(st.sampled_from(["a", "b", "c"]), max_size=14).map(" ".join)


@given(st.lists(vocabulary, max_size=8), st.lists(vocabulary, max_size=8))
def test_the_search_for_repeats_is_exact(held: list[str], texts: list[str]) -> None:
    def pairs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 2]) for at in range(max(1, len(words) - 1))}

    def repeats(one: set[Any], other: set[Any]) -> bool:
        return 5 * len(one & other) >= 4 * len(one | other)

    expected = {at for at, text in enumerate(held) if any(repeats(pairs(text), pairs(other)) for other in texts)}
    assert find_repeated(held, texts) == expected


def test_texts_are_compared_by_their_words() -> None:
    assert normalise("  The `Foo`,\n the BAR: straße!") == "the foo the bar strasse"
    assert find_repeated(["...", "日本語の文", "one", ""], ["…", "日本語の文", "One!"]) == {1, 2}
    assert find_repeated(["a b c d e f"], ["a b c d e"]) == {0}, "4 of 5 pairs"
    assert find_repeated(["a b c d e"], ["a b c d e f"]) == {0}
    counted = Counter(len(find_repeated([f"a{n} " * 3], [f"a{n} " * 3])) for n in range(3))
    assert counted == {1: 3}


def test_preferences_are_what_they_say(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b", "id": "x", "group": "g", "kind": 5})
    found = load_preferences(path="p.jsonl", data_root=tmp_path, rule=ALL_TRAIN, set_aside=tmp_path / "aside.jsonl")
    assert found.train == [Preference((Message("user", "q"),), "a", "b", "", "x", "g")]
