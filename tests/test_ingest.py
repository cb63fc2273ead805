"""Ingest as a program of a bundle: real files, the real interpreter's library, exit codes."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainwright.runtime.errors import INTERRUPTED, DataError
from trainwright.runtime.stages.connectors import stdlib_group
from trainwright.runtime.stages.ingest import Split, assign
from trainwright.runtime.stages.split import SplitRule

SPLITS = ("train", "validation", "test")
STDLIB = """
            ingest.Source(name="code", connector="python-stdlib:code"),
            ingest.Source(name="prose", connector="python-stdlib:prose"),
"""


def run_ingest(bundle: Path, sources: str, data_root: Path | None = None) -> subprocess.CompletedProcess[str]:
    bundle.mkdir(parents=True, exist_ok=True)
    program = bundle / "01_ingest.py"
    program.write_text(
        f"""
from trainwright.runtime.stages import ingest


def main() -> None:
    ingest.run(stage="ingest", sources=({sources}), split=ingest.Split(validation=0.04, test=0.12, seed=1234))


if __name__ == "__main__":
    main()
"""
    )
    environment = {**os.environ, "TRAINWRIGHT_DATA_ROOT": str(data_root or bundle)}
    environment.pop("TRAINWRIGHT_WORK", None)
    return subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)


def output(bundle: Path) -> Path:
    return bundle / "work" / "ingest" / "output"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def records(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [record for path in sorted((output(bundle) / split).iterdir()) for record in lines(path)]
        for split in SPLITS
    }


def content(bundle: Path) -> dict[str, bytes]:
    root = output(bundle)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("stdlib")
    result = run_ingest(bundle, STDLIB)
    assert result.returncode == 0, result.stderr
    return bundle


def write_messy_corpus(folder: Path, names: tuple[str, ...]) -> None:
    """The files `names` in the order given: 5 good documents, 10 bad ones and 2 blank lines in all."""
    contents = {
        "a.jsonl": b"\n".join(
            [
                json.dumps(
                    {"text": "first\r\n\u2028 text", "id": 7, "metadata": {"group": "g", "lang": "en"}}
                ).encode(),
                b'{"text": "cut \xff"}',
                b'{"text": "not closed',
                b'{"txt": "misnamed"}',
                b'{"text": 12}',
                b"",
                b'["text"]',
                b'{"text": "  \\n "}',
                b'{"text": "half a pair \\ud800"}',
                b'{"text": "a number that is none", "metadata": {"score": NaN}}',
                b"[" * 200_000,
                b"  ",
                '{"text": "zwölf 東京 🙂", "metadata": {"group": "g"}}'.encode(),
            ]
        ),
        "b.jsonl.gz": gzip.compress(b'\xef\xbb\xbf{"text": "packed"}\n{"text": "packed too"}\n', mtime=0),
        "notes/c.txt": b"a file\nis a document\n",
        "notes/d.txt": b"caf\xe9",
    }
    for name in names:
        path = folder / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[name])


MESSY = """ingest.Source(name="web", path="corpus/*.jsonl*"), ingest.Source(name="notes", path="corpus/**/*.txt"),"""


def test_bad_documents_are_set_aside_and_the_rest_is_kept(tmp_path: Path) -> None:
    write_messy_corpus(tmp_path, ("a.jsonl", "b.jsonl.gz", "notes/c.txt", "notes/d.txt"))
    result = run_ingest(tmp_path, MESSY)
    assert result.returncode == 0, result.stderr

    kept = [record for rows in records(tmp_path).values() for record in rows]
    assert {record["text"] for record in kept} == {
        "first\r\n\u2028 text",
        "zwölf 東京 🙂",
        "packed",
        "packed too",
        "a file\nis a document\n",
    }
    by_text = {record["text"]: record for record in kept}
    first = by_text["first\r\n\u2028 text"]
    assert first["id"] == "7"
    assert first["metadata"] == {"group": "g", "lang": "en", "source": "web", "path": "corpus/a.jsonl"}
    assert by_text["packed too"]["id"] == "corpus/b.jsonl.gz:2"
    assert by_text["a file\nis a document\n"]["metadata"]["source"] == "notes"

    aside = lines(output(tmp_path) / "set_aside.jsonl")
    assert [(row["file"], row["line"], row["reason"]) for row in aside] == [
        ("corpus/a.jsonl", 2, "invalid UTF-8"),
        ("corpus/a.jsonl", 3, "invalid JSON"),
        ("corpus/a.jsonl", 4, 'no string "text"'),
        ("corpus/a.jsonl", 5, 'no string "text"'),
        ("corpus/a.jsonl", 7, 'no string "text"'),
        ("corpus/a.jsonl", 8, "empty text"),
        ("corpus/a.jsonl", 9, "invalid UTF-8"),
        ("corpus/a.jsonl", 10, "invalid JSON"),
        ("corpus/a.jsonl", 11, "invalid JSON"),
        ("corpus/notes/d.txt", 0, "invalid UTF-8"),
    ]
    assert aside[0]["content"] == '{"text": "cut \\xff"}\n'
    assert len(aside[8]["content"]) == 200

    summary = json.loads((output(tmp_path) / "summary.json").read_text())
    assert summary["set_aside"] == dict(Counter(row["reason"] for row in aside))
    assert summary["kept"] == 5
    assert summary["in"] == summary["kept"] + len(aside)
    assert sum(sum(counts.values()) for counts in summary["documents"].values()) == 5
    assert sum(sum(counts.values()) for counts in summary["bytes"].values()) == sum(
        len(record["text"].encode()) for record in kept
    )
    assert "10" in summary["key_figure"]
    assert "set aside" in result.stdout


def test_a_damaged_gzip_file_costs_only_its_rest(tmp_path: Path) -> None:
    rows = b"".join(b'{"text": "document %d %s"}\n' % (i, os.urandom(40).hex().encode()) for i in range(2000))
    packed = gzip.compress(rows)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "none.jsonl.gz").write_bytes(b"not gzip at all")
    result = run_ingest(tmp_path, 'ingest.Source(name="web", path="*.gz"),')
    assert result.returncode == 0, result.stderr
    kept = sum(len(rows) for rows in records(tmp_path).values())
    assert 500 < kept < 1500
    aside = lines(output(tmp_path) / "set_aside.jsonl")
    assert [(row["file"], row["reason"]) for row in aside] == [
        ("cut.jsonl.gz", "damaged gzip file"),
        ("none.jsonl.gz", "damaged gzip file"),
    ]
    assert aside[0]["line"] == kept + 1


def test_a_pattern_without_files_ends_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    result = run_ingest(tmp_path, 'ingest.Source(name="web", path="corpus/*.jsonl"),', tmp_path / "data[1]")
    assert result.returncode == DataError.exit_code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in ("'corpus/*.jsonl'", str(tmp_path / "data[1]"), "--data-root"):
        assert part in result.stderr
    assert not (output(tmp_path) / "summary.json").exists()


def test_files_are_found_below_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    write_messy_corpus(tmp_path / "data[1]", ("notes/c.txt",))
    result = run_ingest(tmp_path, 'ingest.Source(name="notes", path="corpus/**/*.txt"),', tmp_path / "data[1]")
    assert result.returncode == 0, result.stderr


def test_a_source_of_which_nothing_is_left_ends_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n{"text": ""}\n')
    sources = 'ingest.Source(name="good", path="good.jsonl"), ingest.Source(name="bad", path="bad.jsonl"),'
    result = run_ingest(tmp_path, sources)
    assert result.returncode == DataError.exit_code
    assert result.stderr.count("\n") == 1
    for part in ("'bad'", "'bad.jsonl'", str(tmp_path), "1 empty text", '1 no string "text"', "set_aside.jsonl"):
        assert part in result.stderr
    assert not (output(tmp_path) / "summary.json").exists()


def test_equal_inputs_give_equal_bytes_wherever_and_however_they_were_written(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.jsonl.gz", "notes/c.txt", "notes/d.txt")
    for bundle, order in ((tmp_path / "one", names), (tmp_path / "another", names[::-1])):
        write_messy_corpus(bundle, order)
        assert run_ingest(bundle, MESSY).returncode == 0
    assert content(tmp_path / "one") == content(tmp_path / "another")


def test_leftovers_of_a_killed_run_do_not_survive(tmp_path: Path) -> None:
    write_messy_corpus(tmp_path, ("a.jsonl", "notes/c.txt"))
    assert run_ingest(tmp_path, MESSY).returncode == 0
    expected = content(tmp_path)
    (output(tmp_path) / "summary.json").unlink()
    (output(tmp_path) / "train" / "old.jsonl").write_text("half a rec")
    spool = tmp_path / "work" / "ingest" / "spool"
    spool.mkdir()
    (spool / "web.jsonl").write_text("half a rec")
    assert run_ingest(tmp_path, MESSY).returncode == 0
    assert content(tmp_path) == expected
    assert not spool.exists()


def test_the_library_is_divided_by_package_once_for_both_sources(stdlib: Path) -> None:
    splits = records(stdlib)
    groups = {split: {record["metadata"]["group"] for record in rows} for split, rows in splits.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    homes: dict[str, set[str]] = {}
    for split, rows in splits.items():
        for record in rows:
            homes.setdefault(record["metadata"]["path"].split("/")[0].removesuffix(".py").strip("_"), set()).add(split)
    assert all(len(home) == 1 for home in homes.values())
    paths = [record["metadata"]["path"] for rows in splits.values() for record in rows]
    skipped = {"test", "tests", "idlelib", "lib2to3", "encodings", "msilib", "site-packages", "__pycache__"}
    assert not any(skipped & set(path.split("/")[:-1]) for path in paths)
    assert len(paths) > 600


def test_the_split_is_written_down_for_records_that_come_later(stdlib: Path) -> None:
    rule = SplitRule.read(output(stdlib) / "split.json")
    assert (rule.seed, rule.validation, rule.test) == (1234, 0.04, 0.12)
    homes = {record["metadata"]["group"]: split for split, rows in records(stdlib).items() for record in rows}
    assert rule.groups == homes


def test_the_shares_of_bytes_are_what_was_asked_for(stdlib: Path) -> None:
    summary = json.loads((output(stdlib) / "summary.json").read_text())
    code = {split: summary["bytes"][split]["code"] for split in SPLITS}
    everything = {split: sum(summary["bytes"][split].values()) for split in SPLITS}
    assert code["test"] / sum(code.values()) == pytest.approx(0.12, abs=0.005)
    assert code["validation"] / sum(code.values()) == pytest.approx(0.04, abs=0.005)
    assert everything["test"] / sum(everything.values()) > 0.05
    assert min(count for counts in summary["documents"].values() for count in counts.values()) > 0
    assert 8e6 < sum(everything.values()) < 20e6


def test_prose_is_the_docstrings_and_code_the_source(stdlib: Path) -> None:
    by_id = {record["id"]: record["text"] for rows in records(stdlib).values() for record in rows}
    import json.decoder

    assert by_id["code/json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    prose = by_id["prose/json/decoder.py"]
    assert prose.startswith("Implementation of JSONDecoder\n\n")
    assert "Return the Python representation of ``s``" in prose
    assert "def decode" not in prose


def test_a_package_and_its_python_twin_are_one_group() -> None:
    twins = {
        "_pyio.py": "io.py",
        "_pydatetime.py": "datetime.py",
        "_pydecimal.py": "decimal.py",
        "ntpath.py": "posixpath.py",
    }
    for one, other in twins.items():
        assert stdlib_group(one) == stdlib_group(other)
    assert stdlib_group("asyncio/base_events.py") == stdlib_group("asyncio/__init__.py") == "asyncio"
    assert stdlib_group("_strptime.py") == "strptime"
    assert stdlib_group("pydoc.py") == "pydoc"
    assert len({stdlib_group(name) for name in ("io.py", "datetime.py", "pyclbr.py", "posixpath.py")}) == 4


GROUP_BYTES = st.dictionaries(
    st.sampled_from(("s1", "s2", "s3")),
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10_000), min_size=1, max_size=40),
    min_size=1,
    max_size=3,
)


@given(GROUP_BYTES, st.integers(0, 2**31))
@example({"s1": {"a": 1, "b": 1, "c": 10_000}}, 0)
def test_every_group_has_one_split_and_held_out_text_exists(sizes: dict[str, dict[str, int]], seed: int) -> None:
    split = Split(validation=0.04, test=0.12, seed=seed)
    counters = {source: Counter(groups) for source, groups in sizes.items()}
    assignment = assign(counters, split)
    assert set(assignment) == set().union(*sizes.values())
    assert set(assignment.values()) <= set(SPLITS)
    assert assignment == assign(counters, split)
    groups = next(iter(sizes.values()))
    if len(sizes) == 1 and len(groups) >= 3:
        assert {assignment[group] for group in groups} == set(SPLITS)


@given(st.lists(st.integers(1, 1000), min_size=100, max_size=300), st.integers(0, 2**31))
def test_a_share_is_missed_by_less_than_the_smallest_group_left_out(sizes: list[int], seed: int) -> None:
    groups = Counter({f"group-{i}": size for i, size in enumerate(sizes)})
    assignment = assign({"web": groups}, Split(validation=0.0, test=0.2, seed=seed))
    held = sum(groups[group] for group, home in assignment.items() if home == "test")
    smallest = min(groups[group] for group, home in assignment.items() if home != "test")
    assert 0 <= 0.2 * sum(sizes) - held < smallest


def test_documents_without_a_group_are_held_out_by_their_text(tmp_path: Path) -> None:
    texts = [f"document number {i} {'x' * (i % 50)}" for i in range(5000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::-1][:1000]))
    sources = 'ingest.Source(name="a", path="a.jsonl"), ingest.Source(name="b", path="b.jsonl"),'
    assert run_ingest(tmp_path, sources).returncode == 0
    splits = {split: {record["text"] for record in rows} for split, rows in records(tmp_path).items()}
    assert set().union(*splits.values()) == set(texts)
    assert sum(len(found) for found in splits.values()) == len(texts)  # copies lie in one split
    assert len(splits["test"]) / len(texts) == pytest.approx(0.12, abs=0.01)
    rule = SplitRule.read(output(tmp_path) / "split.json")
    assert all(rule.of(None, text) == split for split, found in splits.items() for text in found)


def test_three_documents_are_enough_for_three_splits(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    assert run_ingest(tmp_path, 'ingest.Source(name="notes", path="*.txt"),').returncode == 0
    assert [len(rows) for rows in records(tmp_path).values()] == [1, 1, 1]


def test_an_interrupt_ends_a_verb_without_traceback(tmp_path: Path) -> None:
    program = tmp_path / "01_wait.py"
    program.write_text(
        """
import os, signal, time
from trainwright.runtime.stages import stage_verb

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits "ignored"

@stage_verb
def run():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

run()
"""
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=50)
    assert (result.returncode, result.stderr) == (INTERRUPTED, "error: interrupted\n")
