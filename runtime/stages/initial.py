"""Where a pretraining gets its first weights from, instead of drawing them: a canonical checkpoint, or what becomes one.

All that can be known without other processes is checked before they meet: on rank 0, from configs and from the headers of files.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron import huggingface
from trainwright.runtime.megatron.canonical import check_tensors, load_canonical
from trainwright.runtime.megatron.checkpoint import load_weights
from trainwright.runtime.megatron.count import whole_shapes
from trainwright.runtime.megatron.model import Embedding, Model
from trainwright.runtime.megatron.model_files import TOKENIZER, check_described, check_same_model, describe
from trainwright.runtime.megatron.weight_files import WeightReader
from trainwright.runtime.reading import ends_of_files, read_json
from trainwright.runtime.step_folders import find_weights, is_canonical, is_huggingface
from trainwright.runtime.workspace import Progress, StageFolder, Workspace, write_json

IMPORTED = "imported.json"  # in a canonical folder: of which Hugging Face folder it was made


@dataclass(frozen=True)
class Initial:
    """The model whose weights a training starts from."""

    path: str  # from the data root: a Hugging Face folder, a canonical checkpoint, or one that a stage of another run left


@dataclass(frozen=True)
class Beginning:
    """An initial model, ready to be loaded."""

    path: str  # as the program says it
    folder: Path  # a canonical checkpoint or a step folder
    identity: str  # 16 hex digits: another model at the same path has others

    def load(self, model: Model) -> None:
        """All ranks call it together. Raises CheckpointError where the folder is damaged or of another model."""
        if is_canonical(self.folder):
            load_canonical(model, self.folder)
        else:
            load_weights(model, self.folder)


def find_beginning(
    initial: Initial, workspace: Workspace, stage: str, model: Any, embedding: Embedding, tokenizer: Path
) -> Beginning:
    """Find and check the initial model of `stage`, before the processes meet; a Hugging Face folder becomes a canonical one
    below the stage's folder, once. Of the ranks only the first does that work, which the others wait for when they meet it.

    `model` is Megatron-Core's TransformerConfig, `tokenizer` that of the data. Raises CheckpointError for a model other than
    the program's, with the fields and the first tensors that differ, for another tokenizer, and for damage; Unsupported for
    a model of a kind that is not read.
    """
    given, own = workspace.data_root / initial.path, workspace.stage(stage)
    if not given.is_dir():
        raise CheckpointError(
            f"the initial model {given} is not a folder: name a Hugging Face folder (config.json and *.safetensors), a canonical "
            "checkpoint, or the folder of a stage that trains"
        )
    source = find_weights(given)
    folder = own.path / "initial" if is_huggingface(source) else source
    beginning = Beginning(initial.path, folder, _identify(source))
    if int(os.environ.get("RANK", "0")) == 0:
        _check_tokenizer(source / TOKENIZER, tokenizer)
        if source is not beginning.folder:
            _import_once(source, beginning, own, model, embedding)
        check_same_model(model, embedding, beginning.folder)
        if is_canonical(beginning.folder):
            check_tensors(
                WeightReader(beginning.folder).shapes, whole_shapes(model, embedding), embedding, beginning.folder
            )
    return beginning


def _import_once(source: Path, beginning: Beginning, stage: StageFolder, model: Any, embedding: Embedding) -> None:
    """Make the canonical folder of a Hugging Face one, unless it was made of the same by an earlier attempt."""
    format, described = huggingface.read_folder(source)
    check_described(described, describe(model, embedding), source)
    mark = beginning.folder / IMPORTED
    if read_json(mark).get("identity") == beginning.identity:
        return
    started = time.monotonic()
    progress: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(stage, total, "tensors"))
        progress[0].update(done)

    huggingface.import_folder(source, beginning.folder, report)
    write_json(mark, {"identity": beginning.identity, "path": str(source)})
    print(f"imported {beginning.path} ({format.name}) in {time.monotonic() - started:.1f} s", flush=True)


def _check_tokenizer(theirs: Path, ours: Path) -> None:
    """A model's weights mean nothing to ids of another tokenizer."""
    if not theirs.exists():
        return
    there, here = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (theirs, ours))
    unlike = sorted(token for token in {*there, *here} if there.get(token) != here.get(token))
    if unlike:
        ids = [f"{token!r} is {there.get(token, 'none')} there, {here.get(token, 'none')} here" for token in unlike[:3]]
        raise CheckpointError(
            f"the initial model's tokenizer {theirs} is not that of the data, {ours}: {len(unlike):,} tokens differ: "
            f"{'; '.join(ids)}. Encode the data with the model's own tokenizer"
        )


def _identify(folder: Path) -> str:
    digest = hashlib.sha256()
    for part in ends_of_files(folder):
        digest.update(part)
    return digest.hexdigest()[:16]
