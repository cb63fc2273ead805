"""Token files that are not whole, or not the model's, are refused before any process waits for another."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.token_files import TokenFiles, tokenizer_id

# What importing megatron-core and torch says.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]

VOCABULARY = 300
DOCUMENTS = {"code": [[5, 6, 7], [8] * 40, [299, 0]], "prose": [[1, 2], [3] * 30]}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What a tokenizer and a tokenize stage leave: two sources; one of them has no validation text."""
    from trainwright.runtime.megatron.data import TokenFile

    output = tmp_path / "tokenize" / "output"
    counts: dict[str, dict[str, int]] = {}
    for split in ("train", "validation", "test"):
        (output / split).mkdir(parents=True)
        counts[split] = dict.fromkeys(DOCUMENTS, 0)
        for source, documents in DOCUMENTS.items():
            if (split, source) == ("validation", "prose"):
                continue
            file = TokenFile(output / split / source, VOCABULARY)
            for document in documents:
                file.add_document(document)
            file.finish()
            counts[split][source] = file.num_tokens
    (tmp_path / "tokenizer" / "output").mkdir(parents=True)
    tokenizer = tmp_path / "tokenizer" / "output" / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}')
    summary = {
        "tokens": counts,
        "bytes": counts,
        "documents": counts,
        "vocab_size": VOCABULARY,
        "end_of_text": 0,
        "tokenizer": tokenizer_id(tokenizer),
    }
    (output / "summary.json").write_text(json.dumps(summary))
    for stage in ("tokenizer", "ingest"):
        (tmp_path / stage / "output").mkdir(parents=True, exist_ok=True)
        (tmp_path / stage / "output" / "summary.json").write_text("{}")
    return tmp_path


def check(work: Path, sources: tuple[str, ...] = ("code", "prose"), vocab_size: int = VOCABULARY) -> None:
    output = work / "tokenize" / "output"
    files = TokenFiles("tokenize", output, json.loads((output / "summary.json").read_text()))
    files.check(sources, vocab_size=vocab_size, tokenizer=work / "tokenizer" / "output" / "tokenizer.json")


def test_whole_files_pass_and_a_split_may_be_empty(work: Path) -> None:
    check(work)
    check(work, vocab_size=VOCABULARY + 20)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda output: os.truncate(output / name, size)


def longer(name: str) -> Callable[[Path], None]:
    def change(output: Path) -> None:
        with (output / name).open("ab") as file:
            file.write(b"\0\0")

    return change


def of_other_documents(output: Path) -> None:
    """As long in tokens as before, and its index is another file's."""
    shutil.copyfile(output / "train" / "prose.idx", output / "train" / "code.idx")


def other_ids(output: Path) -> None:
    data = bytearray((output / "train" / "code.bin").read_bytes())
    data[10:12] = struct.pack("<H", 300)
    (output / "train" / "code.bin").write_bytes(data)


def other_tokenizer(output: Path) -> None:
    (output.parents[1] / "tokenizer" / "output" / "tokenizer.json").write_text('{"version": "2.0"}')


def both_shorter(output: Path) -> None:
    """Files that fit each other, of fewer documents than the summary says."""
    for kind in ("bin", "idx"):
        shutil.copyfile(output / "train" / f"prose.{kind}", output / "train" / f"code.{kind}")


DAMAGES = {
    "no .bin": (
        lambda output: (output / "train" / "code.bin").unlink(),
        r"train/code\.bin is missing: delete .* again",
    ),
    "no .idx": (
        lambda output: (output / "test" / "prose.idx").unlink(),
        r"test/prose\.idx is missing: delete .* again",
    ),
    "cut .bin": (
        cut("train/code.bin", 60),
        r"code\.idx ends at byte 90 of its \.bin, which holds 60: one of them was cut short",
    ),
    "cut .bin by a token": (cut("validation/code.bin", 88), r"ends at byte 90 of its \.bin, which holds 88"),
    "long .bin": (longer("train/prose.bin"), r"prose\.idx ends at byte 64 of its \.bin, which holds 66"),
    "cut .idx": (
        cut("train/code.idx", 100),
        r"code\.idx holds 100 bytes, .* 34 \+ 12 x 3 sequences \+ 8 x 4 documents = 102: it was cut short",
    ),
    "empty .idx": (cut("train/code.idx", 0), r"code\.idx is not the index of a token file"),
    "another .idx": (of_other_documents, r"code\.idx ends at byte 64 of its \.bin, which holds 90"),
    "another pair": (
        both_shorter,
        r"code\.bin holds 64 bytes, and 45 tokens of 2 bytes are 90: it was cut short",
    ),
    "ids": (other_ids, r"code\.bin holds the token id 300, and the model's vocab_size is 300"),
    "tokenizer": (
        other_tokenizer,
        r"the tokens of stage 'tokenize' were encoded with another tokenizer than .*\.json \(",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_whole_or_not_the_models_is_refused(name: str, work: Path) -> None:
    damage, message = DAMAGES[name]
    damage(work / "tokenize" / "output")
    with pytest.raises(DataError, match=message) as caught:
        check(work)
    assert "run stage 'tokenize' again" in str(caught.value)


def test_a_program_that_asks_for_what_is_not_there_is_refused(work: Path) -> None:
    with pytest.raises(
        DataError, match="stage 'tokenize' has no source 'verse', it has code, prose: an edited program"
    ):
        check(work, sources=("code", "verse"))
    with pytest.raises(DataError, match="the tokenizer has 300 tokens, and the model's vocab_size is 256"):
        check(work, vocab_size=256)


PROGRAM = """\
from trainwright.runtime.stages import pretrain

if __name__ == "__main__":
    pretrain.run(
        stage="pretrain", run_id="0", seed=1, parallel=pretrain.Parallel(data=2), model=None, layer_spec="local", ddp=None,
        optimizer=None, schedule=pretrain.Schedule("constant", 4, 0),
        embedding=pretrain.Embedding(
            vocab_size=300, padded_vocab_size=300, sequence_length=8, positions="rope", rotary_base=10_000, tied=True
        ),
        data=pretrain.Data(
            inputs="tokenize", tokenizer="tokenizer", split="ingest", sources=("code",), weights=None, global_batch=8,
            micro_batch=2,
        ),
        validation=pretrain.Validation(every_steps=1, sequences=1, baseline="none", sample_tokens=0),
        checkpoint=pretrain.Checkpoint(every_steps=1, keep_last=1),
    )
"""


def test_a_rank_says_so_before_it_waits_for_the_others(work: Path) -> None:
    """One of two ranks, with nobody at the rendezvous."""
    cut("train/code.bin", 60)(work / "tokenize" / "output")
    program = work / "05_pretrain.py"
    program.write_text(PROGRAM)
    rendezvous = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, **rendezvous, "TRAINWRIGHT_WORK": str(work)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 21, done.stderr
    assert "one of them was cut short" in done.stderr
    assert "Traceback" not in done.stderr
