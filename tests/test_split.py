"""The split that ingest writes down and later stages apply to records that ingest never saw."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.ingest import Split, assign
from trainwright.runtime.stages.split import SplitRule, bucket

SPLITS = ("train", "validation", "test")


def rule(**groups: str) -> SplitRule:
    return SplitRule(seed=3, validation=0.04, test=0.12, groups=groups)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = rule(asyncio="test", json="train")
    written.write(tmp_path / "split.json")
    assert SplitRule.read(tmp_path / "split.json") == written


def test_a_known_group_keeps_its_split_whatever_the_text() -> None:
    known = rule(asyncio="test", json="train", email="validation")
    for content in ("one text", "another"):
        assert [known.of(group, content) for group in ("asyncio", "json", "email")] == ["test", "train", "validation"]


def test_a_text_without_group_lies_where_ingest_put_its_copy() -> None:
    for split in SPLITS:
        assert rule(**{bucket(b"a text"): split}).of(None, "a text") == split


def test_unknown_groups_follow_the_shares_and_the_seed() -> None:
    names = [f"package-{i}" for i in range(20_000)]
    placed = [rule().of(name, "") for name in names]
    counts = Counter(placed)
    assert counts["test"] / len(names) == pytest.approx(0.12, abs=0.01)
    assert counts["validation"] / len(names) == pytest.approx(0.04, abs=0.01)
    other = SplitRule(seed=4, validation=0.04, test=0.12, groups={})
    assert [other.of(name, "") for name in names] != placed
    texts = Counter(rule().of(None, name) for name in names)
    assert texts["test"] / len(names) == pytest.approx(0.12, abs=0.01)


def test_shares_of_zero_hold_nothing_out() -> None:
    nothing = SplitRule(seed=3, validation=0.0, test=0.0, groups={})
    assert {nothing.of(f"package-{i}", "") for i in range(1000)} == {"train"}


@given(st.dictionaries(st.text(max_size=5), st.integers(1, 1000), min_size=1, max_size=30), st.integers(0, 2**31))
def test_what_ingest_assigned_is_what_the_rule_says(sizes: dict[str, int], seed: int) -> None:
    assignment = assign({"web": Counter(sizes)}, Split(validation=0.04, test=0.12, seed=seed))
    applied = SplitRule(seed=seed, validation=0.04, test=0.12, groups=assignment)
    assert {group: applied.of(group, "any text") for group in sizes} == assignment


@pytest.mark.parametrize("content", [None, "{", '{"seed": 1}', "[]", '{"seed": 1, "more": 2}'])
def test_a_missing_or_damaged_split_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"split\.json is no readable split .* run the ingest stage"):
        SplitRule.read(path)
