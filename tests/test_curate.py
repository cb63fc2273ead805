"""Curate as a program of a bundle: what it drops and why, what it keeps, and that nothing is lost between the two."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.runtime.errors import DataError, MissingExtra
from trainwright.runtime.stages import curate
from trainwright.runtime.stages.curation import SAMPLES, Samples, mixture
from trainwright.runtime.stages.duplicates import (
    Deduplicate,
    Fingerprinter,
    find_duplicates,
    num_bands,
    ranked,
    shingles,
    similarity,
)
from trainwright.runtime.stages.filters import load_heuristics
from trainwright.runtime.stages.personal_data import KINDS, scrub
from trainwright.runtime.stages.split import SplitRule

SPLITS = ("train", "validation", "test")
DEDUPLICATE = "curate.Deduplicate(exact=True, near_threshold=0.8, permutations=128, shingle_words=5)"
WEB = 'curate.Source(name="web", filters="none", weight=0.0),'

Texts = dict[str, list[str]]  # by split


def words(seed: int, number: int = 200) -> list[str]:
    """Random words: two seeds share hardly a shingle."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(number)]


def text(seed: int, number: int = 200) -> str:
    return " ".join(words(seed, number))


def edited(seed: int, changes: int, number: int = 200) -> str:
    """`text(seed)` with `changes` words replaced, far from one another: each touches five shingles of five words."""
    changed = words(seed, number)
    for i in range(changes):
        changed[10 + 15 * i] = f"other{i}"
    return " ".join(changed)


def write_ingested(bundle: Path, sources: dict[str, Texts], set_aside: dict[str, int] | None = None) -> None:
    """What stage ingest would leave, with the split as given."""
    output = bundle / "work" / "ingest" / "output"
    documents: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        (output / split).mkdir(parents=True, exist_ok=True)
        documents[split] = {}
        for source, texts in sources.items():
            rows = [
                {"text": content, "id": f"{split}-{content[:40]}", "metadata": {"source": source, "group": "g"}}
                for content in texts.get(split, [])
            ]
            (output / split / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            documents[split][source] = len(rows)
    SplitRule(seed=1, validation=0.1, test=0.1, groups={"g": "train"}).write(output / "split.json")
    (output / "summary.json").write_text(json.dumps({"documents": documents, "set_aside": set_aside or {}}))


def run_curate(
    bundle: Path, sources: str = WEB, deduplicate: str = DEDUPLICATE, scrub: str = '("email",)', preamble: str = ""
) -> subprocess.CompletedProcess[str]:
    program = bundle / "02_curate.py"
    program.write_text(
        f"""
import sys
{preamble}
from trainwright.runtime.stages import curate

if __name__ == "__main__":
    curate.run(stage="curate", inputs="ingest", sources=({sources}), deduplicate={deduplicate}, scrub={scrub}, seed=7)
"""
    )
    return subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)


def curate_here(bundle: Path, monkeypatch: pytest.MonkeyPatch, filters: str = "none", near: float = 0.8) -> None:
    """The verb in this process."""
    monkeypatch.setattr(sys, "argv", [str(bundle / "02_curate.py")])
    monkeypatch.delenv("TRAINWRIGHT_WORK", raising=False)
    names = [path.stem for path in sorted((bundle / "work" / "ingest" / "output" / "train").iterdir())]
    curate.run(
        stage="curate",
        inputs="ingest",
        sources=[curate.Source(name=name, filters=filters, weight=0.0) for name in names],
        deduplicate=Deduplicate(exact=True, near_threshold=near, permutations=128, shingle_words=5),
        scrub=KINDS,
        seed=7,
    )


def output(bundle: Path) -> Path:
    return bundle / "work" / "curate" / "output"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def kept(bundle: Path, source: str = "web") -> Texts:
    return {split: [row["text"] for row in rows(output(bundle) / split / f"{source}.jsonl")] for split in SPLITS}


def summary(bundle: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output(bundle) / "summary.json").read_text())
    return loaded


def dropped(bundle: Path) -> Counter[str]:
    """Documents by filter, all splits and sources."""
    return sum(
        (Counter(names) for sources in summary(bundle)["dropped_by"].values() for names in sources.values()), Counter()
    )


def progress(bundle: Path) -> dict[str, int]:
    loaded = json.loads((bundle / "work" / "curate" / "progress.json").read_text())
    return {key: loaded[key] for key in ("done", "total")}


# The standard library.


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle after ingest and curate, as the demo sets them, and what curate printed."""
    bundle = tmp_path_factory.mktemp("stdlib")
    program = bundle / "01_ingest.py"
    program.write_text(
        """
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
    )
    subprocess.run([sys.executable, program], check=True, capture_output=True)
    sources = """curate.Source(name="code", filters="code", weight=0.8),
        curate.Source(name="prose", filters="prose", weight=0.2),"""
    result = run_curate(bundle, sources, scrub='("email", "ip", "card", "iban")')
    assert result.returncode == 0, result.stderr
    return bundle, result.stdout


def test_every_document_of_the_library_is_kept_or_dropped_by_name(stdlib: tuple[Path, str]) -> None:
    bundle, printed = stdlib
    ingested = json.loads((bundle / "work" / "ingest" / "output" / "summary.json").read_text())
    figures = summary(bundle)
    assert figures["in"] == ingested["in"] == figures["kept"] + figures["dropped"] + sum(figures["set_aside"].values())
    for split in SPLITS:
        for source in ("code", "prose"):
            there = rows(output(bundle) / split / f"{source}.jsonl")
            assert figures["documents"][split][source] == len(there)
            assert figures["bytes"][split][source] == sum(len(row["text"].encode()) for row in there)
            gone = sum(figures["dropped_by"][split][source].values())
            assert (
                figures["read"]["documents"][split][source] == ingested["documents"][split][source] == len(there) + gone
            )
            assert figures["read"]["bytes"][split][source] == ingested["bytes"][split][source]
    for name, count in dropped(bundle).items():
        assert any(line.split()[:2] == [name, f"{count:,}"] for line in printed.splitlines())
    assert f"in {figures['in']:,} documents = kept {figures['kept']:,} + dropped {figures['dropped']:,}" in printed
    split_files = [bundle / "work" / stage / "output" / "split.json" for stage in ("ingest", "curate")]
    assert split_files[0].read_bytes() == split_files[1].read_bytes()
    assert not (bundle / "work" / "curate" / "spool").exists()


def test_the_library_loses_what_deserves_it(stdlib: tuple[Path, str]) -> None:
    bundle, _ = stdlib
    figures, names = summary(bundle), dropped(bundle)
    samples = {row["id"]: row for row in rows(output(bundle) / "dropped.jsonl")}
    # Generated tables, the text of the language reference among them, are nearly all that code loses.
    assert samples["code/pydoc_data/topics.py"]["filter"] == "code/autogenerated"
    assert samples["code/keyword.py"]["filter"] == "code/autogenerated"
    assert {name for name in names if name.startswith("code/")} == {"code/autogenerated"}
    code = {
        split: figures["read"]["documents"][split]["code"] - figures["documents"][split]["code"] for split in SPLITS
    }
    assert sum(code.values()) < 12
    # Docstrings are dropped where they are too short to judge, or say themselves again.
    assert names["gopher-quality/short_doc"] > sum(names.values()) / 2
    size = [sum(figures[key][split]["prose"] for split in SPLITS) for key in ("bytes",)]
    size.append(sum(figures["read"]["bytes"][split]["prose"] for split in SPLITS))
    assert 0.9 < size[0] / size[1] < 0.97
    assert samples["prose/bisect.py"]["filter"].startswith("gopher-repetition/dup_para")
    ids = {row["id"] for split in SPLITS for row in rows(output(bundle) / split / "prose.jsonl")}
    assert {"prose/os.py", "prose/datetime.py", "prose/doctest.py", "prose/turtle.py", "prose/argparse.py"} <= ids


def test_the_authors_addresses_are_replaced_and_nothing_else_changes(stdlib: tuple[Path, str]) -> None:
    bundle, printed = stdlib
    finds = summary(bundle)["scrubbed"]
    total: Counter[str] = sum((Counter(kinds) for part in finds.values() for kinds in part.values()), Counter())
    assert 100 < total["email"] < 200
    assert total["ip"] < 20
    assert set(total) == {"email", "ip"}
    assert f"replaced {total['email']} email, {total['ip']} ip" in printed
    changed = 0
    for split in SPLITS:
        path = f"{split}/code.jsonl"
        before = {row["id"]: row for row in rows(bundle / "work" / "ingest" / "output" / path)}
        for row in rows(output(bundle) / path):
            was = before[row["id"]]
            assert row["metadata"] == was["metadata"]
            if row["text"] != was["text"]:
                changed += 1
                assert scrub(was["text"], KINDS)[0] == row["text"]
    assert changed > 30
    everything = "".join(path.read_text() for path in sorted(output(bundle).rglob("*.jsonl")))
    assert "guido@python.org" not in everything
    assert "192.0.2.128" in everything


def test_each_filter_shows_a_few_samples(stdlib: tuple[Path, str]) -> None:
    bundle, _ = stdlib
    samples = rows(output(bundle) / "dropped.jsonl")
    shown = Counter(row["filter"] for row in samples)
    assert shown == {name: min(count, SAMPLES) for name, count in dropped(bundle).items()}
    assert max(shown.values()) == SAMPLES
    assert all(row["excerpt"] and row["split"] in SPLITS and row["source"] in ("code", "prose") for row in samples)
    near = next(row for row in samples if row["filter"] == "duplicate/near")
    assert near["similarity"] >= 0.8
    assert near["repeats"]["id"] != near["id"]


def test_samples_do_not_depend_on_the_order_and_show_a_text_once(tmp_path: Path) -> None:
    records = [{"id": str(i % 90), "text": f"text {i % 90}"} for i in range(100)]
    shown = []
    for name, seed in (("one", 7), ("other", 7), ("reseeded", 8)):
        samples = Samples(seed)
        for record in records if name == "one" else records[::-1]:
            samples.offer("rule", record, ("train", "web"), dict)
        samples.write(tmp_path / name)
        shown.append([row["id"] for row in rows(tmp_path / name)])
    assert shown[0] == shown[1]
    assert len(set(shown[0])) == len(shown[0]) == SAMPLES
    assert set(shown[2]) != set(shown[0])


# Duplicates.


def test_an_edited_copy_is_dropped_and_a_similar_document_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy, similar = text(1), edited(1, 2), edited(1, 8)
    assert similarity(shingles(original, 5), shingles(copy, 5)) > 0.85
    assert 0.5 < similarity(shingles(original, 5), shingles(similar, 5)) < 0.75
    write_ingested(tmp_path, {"web": {"train": [original, copy, similar, text(2)]}})
    curate_here(tmp_path, monkeypatch)
    assert similar in kept(tmp_path)["train"]
    assert text(2) in kept(tmp_path)["train"]
    assert len(kept(tmp_path)["train"]) == 3
    assert dropped(tmp_path) == {"duplicate/near": 1}


def test_equal_text_is_one_document_whatever_its_case_and_white_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "Some few words.",
        "some  few\n\twords.\n",
        "SOME FEW WORDS.",
        "some few words",
        "..!",
        "  ..!",
        "other words",
    ]
    write_ingested(tmp_path, {"web": {"train": texts[:4]}, "notes": {"train": texts[4:]}})
    curate_here(tmp_path, monkeypatch, near=0.0)
    assert dropped(tmp_path) == {"duplicate/exact": 3}
    left = [*kept(tmp_path)["train"], *kept(tmp_path, "notes")["train"]]
    assert len({"".join(content.lower().split()) for content in left}) == len(left) == 4


def test_training_text_gives_way_to_held_out_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the copy in training is the longer one, and comes first."""
    longer = edited(1, 2) + " and more"
    corpus = {
        "train": [longer, text(2), text(3), text(4)],
        "validation": [text(2).upper(), edited(5, 1), text(6)],
        "test": [text(1), text(5), text(3) + "\n"],
    }
    write_ingested(tmp_path, {"web": corpus})
    curate_here(tmp_path, monkeypatch)
    assert kept(tmp_path) == {
        "train": [text(4)],
        "validation": [text(2).upper(), text(6)],
        "test": corpus["test"],
    }
    assert dropped(tmp_path) == {
        "duplicate/near-of-test": 2,
        "duplicate/exact-of-test": 1,
        "duplicate/exact-of-validation": 1,
    }
    sample = next(row for row in rows(output(tmp_path) / "dropped.jsonl") if row["excerpt"] == longer[:300])
    assert (sample["repeats"]["split"], sample["repeats"]["id"]) == ("test", f"test-{text(1)[:40]}")


def test_the_order_of_documents_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [edited(1, changes) for changes in range(12)]  # each like the next, the ends unlike
    texts = [*chain, *(text(seed) for seed in range(2, 10)), *(text(seed).upper() for seed in range(2, 6))]
    results = []
    for name, seed in (("one", 1), ("other", 2)):
        shuffled = texts.copy()
        random.Random(seed).shuffle(shuffled)
        write_ingested(tmp_path / name, {"web": {"train": shuffled}})
        curate_here(tmp_path / name, monkeypatch)
        results.append(
            (sorted(kept(tmp_path / name)["train"]), (output(tmp_path / name) / "dropped.jsonl").read_bytes())
        )
    assert results[0] == results[1]
    assert 10 <= len(results[0][0]) < len(texts) - 4


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_what_is_dropped_is_what_comparing_every_pair_would_drop(seed: int) -> None:
    rng = random.Random(seed)
    texts = [edited(rng.randint(0, 5), rng.randint(0, 9), 150) for _ in range(40)]
    rule = Deduplicate(exact=True, near_threshold=0.7, permutations=128, shingle_words=3)
    fingerprinter = Fingerprinter(rule, seed=3)
    splits = [rng.randint(0, 2) for _ in texts]
    fingerprints = [
        fingerprinter(content, str(i).encode(), split)
        for i, (content, split) in enumerate(zip(texts, splits, strict=True))
    ]
    found = find_duplicates(fingerprints, rule, texts.__getitem__)
    stays: list[int] = []
    for index in ranked(fingerprints):
        own = shingles(texts[index], 3)
        similar = [other for other in stays if similarity(own, shingles(texts[other], 3)) >= 0.7]
        assert (index in found) == bool(similar)
        if index in found:
            assert found[index].of in similar
            assert splits[found[index].of] <= splits[index]
        else:
            stays.append(index)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    bands = num_bands(threshold, 128)
    assert 128 % bands == 0
    missed = (1 - threshold ** (128 / bands)) ** bands
    assert missed <= 0.001 or bands == 128
    assert bands == 1 or (1 - threshold ** (256 / bands)) ** (bands / 2) > 0.001  # and no more bands than that takes


def test_shingles_are_runs_of_words() -> None:
    assert shingles("A b, c-D!", 2) == {"a b", "b c", "c d"}
    assert shingles("few words", 5) == {"few words"}
    assert shingles("?!", 5) == set()


# Heuristics.

SENTENCES = " ".join(
    f"The {a} {b} of {c} is {d} to {e}." for a, b, c, d, e in zip(*[iter(words(1, 150))] * 5, strict=True)
)
FINE_CODE = "import os\n\n\ndef names(folder):\n    return sorted(os.listdir(folder))\n"


@pytest.mark.parametrize(
    ("kind", "content", "verdict"),
    [
        ("prose", SENTENCES, None),
        ("prose", "Only a few words of the text.", "gopher-quality/short_doc"),
        (
            "prose",
            " ".join([SENTENCES[:400], *(str(number) for number in range(1000, 1030))]),
            "gopher-quality/below_alpha_threshold",
        ),
        ("prose", text(1), "gopher-quality/enough_stop_words"),
        ("prose", " ".join(f"{word}ification{word}" for word in words(1, 60)), "gopher-quality/above_avg_threshold"),
        ("prose", SENTENCES.replace(" is ", " # is # "), "gopher-quality/too_many_hashes"),
        ("prose", "\n".join(f"- {part}" for part in SENTENCES.split(". ")), "gopher-quality/too_many_bullets"),
        ("prose", "\n\n".join([SENTENCES[:300]] * 3), "gopher-repetition/dup_para_frac"),
        ("prose", "\n".join([SENTENCES[:300], *["with the same line again"] * 12]), "gopher-repetition/dup_line_frac"),
        ("prose", SENTENCES + " so that names(folder)[0] == sorted(os.listdir(folder))[0], (see: `os`)" * 2, None),
        ("code", FINE_CODE, None),
        ("code", FINE_CODE + "TABLE = " + repr(list(range(400))) + "\n", "code/max_line_length"),
        ("code", "\n".join("x" * 120 for _ in range(9)), "code/mean_line_length"),
        ("code", "{}[]();\n" * 20 + "x = 1\n", "code/alphanumeric_share"),
        ("code", '"""Tables.\n\nGenerated automatically from others.\n"""\n' + FINE_CODE, "code/autogenerated"),
        ("code", FINE_CODE + "# what follows is autogenerated\n", None),
        ("none", "x", None),
    ],
)
def test_each_rule_names_itself(kind: str, content: str, verdict: str | None) -> None:
    assert load_heuristics(kind)(content) == verdict


def test_text_between_gopher_s_limit_and_ours_is_kept() -> None:
    """A fifth of it repeated: what a reference text's entries do."""
    formula = "If the argument is true, this has the same effect as the one before, and returns what that returns."
    entries = [f"{' '.join(words(seed, 45))} the of and. {formula}" for seed in range(8)]
    assert load_heuristics("prose")("\n".join(entries)) is None
    assert load_heuristics("prose")("\n".join(entry[-180:] for entry in entries)) is not None


# Personal data.


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("email", "Ask jane.doe+lists@mail.acme.co.uk, or <joe@acme.org>.", "Ask <EMAIL>, or <<EMAIL>>."),
        ("email", "mailto:o_k%x@a-b.info?subject=x", "mailto:<EMAIL>?subject=x"),
        (
            "ip",
            "from 8.8.8.8:53 to 151.101.1.69, then [2606:4700:4700::1111]:80",
            "from <IP>:53 to <IP>, then [<IP>]:80",
        ),
        ("ip", "2a00:1450:4001:81b:0:0:0:200e: refused. Next.", "<IP>: refused. Next."),
        ("ip", "http://93.184.215.14/index", "http://<IP>/index"),
        ("card", "paid with 4111 1111 1111 1111 and 5500-0055-5555-5559.", "paid with <CARD> and <CARD>."),
        (
            "card",
            "amex 378282246310005, 3782 822463 10005; diners 30569309025904",
            "amex <CARD>, <CARD>; diners <CARD>",
        ),
        ("iban", "to DE89 3704 0044 0532 0130 00 BIC COBADEFF", "to <IBAN> BIC COBADEFF"),
        ("iban", "GB29NWBK60161331926819, FR1420041010050500013M02606.", "<IBAN>, <IBAN>."),
        ("iban", "NO93 8601 1117 947", "<IBAN>"),
    ],
)
def test_personal_data_is_replaced(kind: str, before: str, after: str) -> None:
    found, counts = scrub(before, [kind])
    assert found == after
    assert counts == {kind: after.count(f"<{kind.upper()}>")}
    assert scrub(before, [other for other in KINDS if other != kind]) == (before, {})


@pytest.mark.parametrize(
    "content",
    [
        "user@example.com, jane@mail.example.org, x@host.test, root@localhost",
        "git@github.com:acme/tool.git",
        "y = a@b.T + w@x.transpose() @dataclass.field, logo@2x.png, pkg@1.2.3, @decorator.name",
        "getty@tty1.service and %s@%s.%s",
        "127.0.0.1, 10.1.2.3, 192.168.0.1, 172.16.5.4, 169.254.1.1, 224.0.0.1, 255.255.255.0, 0.0.0.0",
        "192.0.2.7, 198.51.100.1, 203.0.113.9, ::1, fe80::1, fd00::1:2, ff02::1, 2001:db8::8a2e:370",
        "version 1.2.3.4, v1.2.3.4, Version: 4.8.15.16, ==1.2.3.4, >= 1.2.3.4, tool-1.2.3.4.tar.gz, 1.2.3.4-beta",
        "__version__ = '1.2.3.4', Firefox/3.6.3.1, 1.2.3.4.5, 1.3.6.1.4.1.311, section 8.2.4.44, 300.1.2.3, 01.02.03.04",
        "std::vector<a::b> face::bad, x[2000::2], x[2000::3000], 12:30:45, 00:1b:44:11:3a:b7, ::",
        "4111 1111 1111 1112, 4503599627370496, 1600000000000000, 0.4111111111111111, 41111111111111110000000",
        "f4111111111111111, 4111111111111111-1, 9780306406157, 1234 5678 9012 3452",
        "DE89 3704 0044 0532 0130 01, XX46370400440532013000, DE893704004405320130, AB12 CONSTANT NAMES IN CAPITALS",
        "xDE89370400440532013000, DE89370400440532013000X",
    ],
)
def test_what_looks_like_personal_data_stays(content: str) -> None:
    assert scrub(content, KINDS) == (content, {})


def test_held_out_text_is_scrubbed_and_copies_are_found_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ingested(
        tmp_path,
        {"web": {"train": ["by a@acme.com", "by b@acme.com", text(1)], "test": ["at 151.101.1.69 since then"]}},
    )
    curate_here(tmp_path, monkeypatch)
    assert kept(tmp_path) == {"train": ["by <EMAIL>", text(1)], "validation": [], "test": ["at <IP> since then"]}
    assert summary(tmp_path)["scrubbed"]["train"]["web"] == {"email": 2}
    assert summary(tmp_path)["scrubbed"]["test"]["web"] == {"ip": 1}
    assert dropped(tmp_path) == {"duplicate/exact": 1}


# The mixture.


def test_the_mixture_says_how_often_a_source_is_read() -> None:
    parts = mixture({"code": 0.6, "prose": 0.2}, {"code": 3, "prose": 2}, {"code": 900, "prose": 100})
    assert parts["code"] == {
        "documents": 3,
        "bytes": 900,
        "natural_share": 0.9,
        "wanted_share": pytest.approx(0.75),
        "epochs": pytest.approx(0.75 / 0.9),
        "repeats": 1.0,
    }
    assert parts["prose"]["epochs"] == pytest.approx(2.5)
    assert parts["prose"]["repeats"] == pytest.approx(3.0)
    assert sum(part["epochs"] * part["bytes"] for part in parts.values()) == pytest.approx(1000)
    by_bytes = mixture({"code": 0.0, "prose": 0.0}, {"code": 3, "prose": 2}, {"code": 900, "prose": 100})
    assert [(part["wanted_share"], part["epochs"], part["repeats"]) for part in by_bytes.values()] == [
        (0.9, 1.0, 1.0),
        (0.1, 1.0, 1.0),
    ]


def test_the_mixture_stands_in_the_summary_and_the_log(stdlib: tuple[Path, str]) -> None:
    bundle, printed = stdlib
    parts, figures = summary(bundle)["mixture"], summary(bundle)
    assert {name: part["wanted_share"] for name, part in parts.items()} == {"code": 0.8, "prose": 0.2}
    assert {name: part["bytes"] for name, part in parts.items()} == figures["bytes"]["train"]
    assert math.isclose(sum(part["natural_share"] for part in parts.values()), 1)
    assert f"{parts['prose']['epochs']:.2f} epochs at equal bytes" in printed


# Ends.


def test_what_ingest_and_curate_set_aside_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1), "raise", text(2)]}}, {"invalid JSON": 3, "empty text": 1})

    def judge(content: str) -> str | None:
        return f"n/{1 // 0}" if content == "raise" else None

    monkeypatch.setattr(curate, "load_heuristics", lambda kind: judge)
    curate_here(tmp_path, monkeypatch)
    figures = summary(tmp_path)
    assert figures["set_aside"] == {"invalid JSON": 3, "empty text": 1, "ZeroDivisionError in a filter": 1}
    assert (figures["in"], figures["kept"], figures["dropped"]) == (7, 2, 0)
    (aside,) = rows(output(tmp_path) / "set_aside.jsonl")
    assert (aside["file"], aside["line"], aside["reason"]) == ("train/web.jsonl", 2, "ZeroDivisionError in a filter")
    assert aside["content"].endswith(": raise")
    assert progress(tmp_path) == {"done": 6, "total": 6}


def test_a_source_of_which_nothing_is_left_ends_with_one_message(tmp_path: Path) -> None:
    write_ingested(
        tmp_path,
        {"web": {"train": ["a few words", "other words", text(3)], "test": [text(3)]}, "notes": {"train": [SENTENCES]}},
    )
    sources = 'curate.Source("web", "prose", 0.0), curate.Source("notes", "prose", 0.0)'
    result = run_curate(tmp_path, sources)
    assert result.returncode == DataError.exit_code
    assert result.stderr == (
        "error: source 'web': of 4 documents none is left to train on: 2 gopher-quality/short_doc, 2 "
        f"gopher-quality/enough_stop_words; {output(tmp_path) / 'dropped.jsonl'} shows them; set filters: none for it,"
        " or leave the source out\n"
    )
    assert len(rows(output(tmp_path) / "dropped.jsonl")) == 4
    assert not (output(tmp_path) / "summary.json").exists()
    write_ingested(tmp_path, {"web": {"train": [edited(1, 1)], "test": [text(1)]}})
    result = run_curate(tmp_path)
    assert "1 duplicate/near-of-test" in result.stderr
    assert "set near_duplicates: 0 for the curate stage, or leave the source out" in result.stderr


def test_a_split_of_which_nothing_is_left_is_a_warning(tmp_path: Path) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1)], "validation": [text(2)], "test": [text(2)]}})
    result = run_curate(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: source 'web' has nothing left in validation" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": 'curate.Source("books", "none", 0.0),'}, "stage 'ingest' has no source 'books'; it has web"),
        (
            {"sources": 'curate.Source("web", "poetry", 0.0),'},
            "there are no filters 'poetry'; there are prose, code, none",
        ),
        ({"scrub": '("name",)'}, "there is no personal data of kind 'name'; there are email, ip, card, iban"),
    ],
)
def test_a_program_that_asks_for_what_is_not_there(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1)]}})
    result = run_curate(tmp_path, **arguments)
    assert (result.returncode, result.stderr) == (DataError.exit_code, f"error: {message}\n")


@pytest.mark.parametrize("package", ["datatrove", "rensa"])
def test_a_missing_package_is_named_before_anything_is_done(tmp_path: Path, package: str) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1)]}})
    result = run_curate(tmp_path, preamble=f'sys.modules["{package}"] = None')
    assert result.returncode == MissingExtra.exit_code
    assert result.stderr.startswith(f"error: curate needs {package} ")
    assert result.stderr.endswith("install it with pip install 'trainwright[data]'\n")
    assert not (tmp_path / "work" / "curate").exists()


def test_files_that_do_not_hold_what_ingest_counted_are_refused(tmp_path: Path) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1), text(2)]}})
    path = tmp_path / "work" / "ingest" / "output" / "train" / "web.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    result = run_curate(tmp_path)
    assert result.returncode == DataError.exit_code
    assert "counted 2 documents of web and its files hold 1" in result.stderr
    assert not (output(tmp_path) / "summary.json").exists()


def test_leftovers_of_a_killed_run_do_not_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ingested(tmp_path, {"web": {"train": [text(1), text(2)], "test": [text(3)]}})

    def everything() -> dict[str, bytes]:
        folder = tmp_path / "work" / "curate"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "progress.json"
        }

    curate_here(tmp_path, monkeypatch)
    expected = everything()
    (output(tmp_path) / "summary.json").unlink()
    (output(tmp_path) / "train" / "web.jsonl").write_text("half a rec")
    (output(tmp_path) / "train" / "old.jsonl").write_text("{}")
    spool = tmp_path / "work" / "curate" / "spool" / "train"
    spool.mkdir(parents=True)
    (spool / "web.jsonl").write_text("half a rec")
    curate_here(tmp_path, monkeypatch)
    assert everything() == expected
    assert progress(tmp_path) == {"done": 6, "total": 6}


def test_the_tokenizer_reads_what_curate_leaves(stdlib: tuple[Path, str]) -> None:
    bundle, _ = stdlib
    program = bundle / "03_tokenizer.py"
    program.write_text(
        "from trainwright.runtime.stages import tokenizer\n\n"
        'tokenizer.run(stage="tokenizer", inputs="curate", vocab_size=300)\n'
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    count = sum(summary(bundle)["documents"]["train"].values())
    assert f"trained byte-level BPE on {count:,} documents" in result.stdout
