"""Tokenizer and tokenize: what the encoder loses (nothing), and what Megatron reads back from the files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages import tokenizer
from trainwright.runtime.stages.corpus import read_texts

# What importing megatron-core and torch says.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]

SPLITS = ("train", "validation", "test")
SPECIAL = {"<|endoftext|>": 0, "<|pad|>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
SPELT_OUT = "a document may spell <|endoftext|> out, or <|im_start|>"
ODD_TEXTS = (SPELT_OUT, "zwölf 東京 🙂\r\n\u2028\x00 \t\t  end", "def f(x):\n    return x  # noqa\n")


def run_stage(bundle: Path, name: str, arguments: str) -> subprocess.CompletedProcess[str]:
    program = bundle / f"01_{name}.py"
    program.write_text(
        f"from trainwright.runtime.stages import {name}\n\n"
        f'if __name__ == "__main__":\n    {name}.run(stage="{name}", {arguments})\n'
    )
    environment = {**os.environ, "TRAINWRIGHT_DATA_ROOT": str(bundle)}
    environment.pop("TRAINWRIGHT_WORK", None)
    return subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)


INGEST = """sources=(
    ingest.Source(name="web", path="web.jsonl"), ingest.Source(name="notes", path="notes.jsonl"),
), split=ingest.Split(validation=0.1, test=0.1, seed=1)"""
TOKENIZER = 'inputs="ingest", vocab_size=400'
TOKENIZE = 'inputs="ingest", tokenizer="tokenizer"'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle after ingest, tokenizer and tokenize."""
    folder = tmp_path_factory.mktemp("bundle")
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("train", "model", "Größe", "data", "x") for b in ("", "ing", "s", "_1")]
    texts = [" ".join(rng.choice(words, size=rng.integers(5, 200))) for _ in range(300)]
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ODD_TEXTS * 2))
    for name, arguments in (("ingest", INGEST), ("tokenizer", TOKENIZER), ("tokenize", TOKENIZE)):
        result = run_stage(folder, name, arguments)
        assert result.returncode == 0, result.stderr
    return folder


def output(bundle: Path, stage: str) -> Path:
    return bundle / "work" / stage / "output"


def summary(bundle: Path, stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output(bundle, stage) / "summary.json").read_text())
    return loaded


def encoder(bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(output(bundle, "tokenizer") / "tokenizer.json"))


def test_the_vocabulary_is_what_the_model_expects(bundle: Path) -> None:
    vocabulary = encoder(bundle).get_vocab()
    assert {token: vocabulary[token] for token in SPECIAL} == SPECIAL
    figures = summary(bundle, "tokenizer")
    assert figures["vocab_size"] == len(vocabulary) <= 400
    texts = [text for path in sorted((output(bundle, "ingest") / "validation").iterdir()) for text in read_texts(path)]
    num_tokens = sum(len(encoder(bundle).encode(text).ids) for text in texts)
    expected = sum(len(text.encode()) for text in texts) / num_tokens
    assert figures["validation_bytes_per_token"] == pytest.approx(expected)
    assert f"{expected:.2f}" in figures["key_figure"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(iter(["the quick brown fox jumps over the lazy dog " * 3, "naïve 東京"]), 300)


@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_equal_texts_give_an_equal_tokenizer(bundle: Path) -> None:
    path = output(bundle, "tokenizer") / "tokenizer.json"
    before = path.read_bytes()
    assert run_stage(bundle, "tokenizer", TOKENIZER).returncode == 0
    assert path.read_bytes() == before


def test_a_text_too_small_for_the_vocabulary_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "few words"}\n{"text": "fewer"}\n{"text": "no"}\n')
    (tmp_path / "notes.jsonl").write_text('{"text": "other words"}\n')
    assert run_stage(tmp_path, "ingest", INGEST).returncode == 0
    result = run_stage(tmp_path, "tokenizer", 'inputs="ingest", vocab_size=5000')
    assert result.returncode == 0, result.stderr
    assert "warning: the text has pairs for" in result.stdout
    assert 260 <= summary(tmp_path, "tokenizer")["vocab_size"] < 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused(bundle: Path) -> None:
    result = run_stage(bundle, "tokenizer", 'inputs="ingest", vocab_size=200')
    assert result.returncode == DataError.exit_code
    assert result.stderr == "error: a vocabulary of 200 tokens is too small: special tokens and bytes take 260\n"
    assert summary(bundle, "tokenizer")["vocab_size"] > 260  # what was finished is still there


def test_a_stage_that_did_not_run_is_named(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "tokenizer", TOKENIZER)
    assert result.returncode == DataError.exit_code
    assert "run stage 'ingest' first" in result.stderr
    assert result.stderr.count("\n") == 1


def test_megatron_reads_back_the_documents_of_every_split_and_source(bundle: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    reference = encoder(bundle)
    reference.encode_special_tokens = True
    figures = summary(bundle, "tokenize")
    assert figures["end_of_text"] == 0
    assert figures["vocab_size"] == reference.get_vocab_size()
    for split in SPLITS:
        for source in ("web", "notes"):
            texts = list(read_texts(output(bundle, "ingest") / split / f"{source}.jsonl"))
            assert texts, "the corpus gives every split and source a document"
            file = IndexedDataset(str(output(bundle, "tokenize") / split / source))
            assert file.index.dtype is np.uint16
            documents = [file[i].tolist() for i in range(len(file))]
            assert documents == [[*reference.encode(text).ids, 0] for text in texts]
            assert [document.count(0) for document in documents] == [1] * len(texts)
            assert figures["documents"][split][source] == len(texts)
            assert figures["bytes"][split][source] == sum(len(text.encode()) for text in texts)
            assert figures["tokens"][split][source] == sum(len(document) for document in documents)


def test_a_special_token_that_a_document_spells_out_stays_text(bundle: Path) -> None:
    path = output(bundle, "tokenizer") / "tokenizer.json"
    from trainwright.runtime.stages.tokenize import load_encoder

    careful = load_encoder(path)
    ids = careful.encode(SPELT_OUT).ids
    assert not set(ids) & set(SPECIAL.values())
    assert careful.decode(ids, skip_special_tokens=False) == SPELT_OUT
    assert 0 in encoder(bundle).encode(SPELT_OUT).ids  # what the library does unasked


def test_ids_beyond_two_bytes_take_four(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from trainwright.runtime.megatron.data import TokenFile

    for vocab_size, dtype, ids in ((65_536, np.uint16, [0, 65_535]), (65_537, np.int32, [0, 65_536])):
        writer = TokenFile(tmp_path / str(vocab_size), vocab_size)
        writer.add_document(ids)
        writer.add_document([1])
        writer.finish()
        assert writer.num_tokens == 3
        file = IndexedDataset(str(tmp_path / str(vocab_size)))
        assert file.index.dtype is dtype
        assert [file[i].tolist() for i in range(len(file))] == [ids, [1]]


def test_an_empty_train_split_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "work" / "ingest" / "output"
    empty.mkdir(parents=True)
    (empty / "summary.json").write_text(json.dumps({"documents": {split: {"web": 0} for split in SPLITS}}))
    result = run_stage(tmp_path, "tokenizer", TOKENIZER)
    assert result.returncode == DataError.exit_code
    assert "the train split of stage 'ingest' is empty" in result.stderr
    done = tmp_path / "work" / "tokenizer" / "output"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    result = run_stage(tmp_path, "tokenize", TOKENIZE)
    assert result.returncode == DataError.exit_code
    assert "error: the train split of stage 'ingest' is empty" in result.stderr
    assert "Traceback" not in result.stderr


def test_tokenizing_again_forgets_what_was_derived_from_the_old_files(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    index, leftover = copy / "work" / "tokenize" / "index", output(copy, "tokenize") / "train" / "gone.bin"
    index.mkdir()
    leftover.write_bytes(b"\x00\x00")
    (output(copy, "tokenize") / "summary.json").unlink()
    assert run_stage(copy, "tokenize", TOKENIZE).returncode == 0
    assert not index.exists()
    files = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (output(bundle, "tokenize"), output(copy, "tokenize"))
    ]
    assert files[0] == files[1]
