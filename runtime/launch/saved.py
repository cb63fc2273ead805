"""A model that another bundle saved, named by a path in a spec: which of its checkpoints that is, and its identity.

`checkpoints/step-<n>/` is complete when it holds `metadata.json` and `run.json`, which are written last.
"""

import hashlib
from pathlib import Path

from trainwright.runtime.errors import DataError

LAST_FILES = ("metadata.json", "run.json")
PART_BYTES = 65536  # of a file's beginning and of its end


def find_step(path: Path) -> Path:
    """The newest complete step folder of `path`: such a folder itself, a `checkpoints` folder, or a stage's folder.

    Raises DataError where there is none, or it cannot be read.
    """
    try:
        for folder in (path, path / "checkpoints"):
            if _is_complete(folder):
                return folder
            steps = [step for step in folder.glob("step-*") if step.name[5:].isdigit() and _is_complete(step)]
            if steps:
                return max(steps, key=lambda step: int(step.name[5:]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    raise DataError(
        f"{path}: is a folder without a complete checkpoint (step-<n> with {' and '.join(LAST_FILES)}); name a step folder,"
        " a checkpoints folder or a stage's folder where a model is wanted, and files (folder/*.jsonl) where data are"
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in LAST_FILES)


def model_id(path: Path) -> str:
    """16 hex digits of the newest complete checkpoint that `path` leads to (see `find_step`, and its errors).

    Of every file the name, the size, and the first and last 64 KiB: all of a small one, enough of a file of weights to tell two
    trainings apart. A checkpoint may hold terabytes, so that reading all of it at every `run` and `status` is out of question.
    """
    step = find_step(path)
    digest = hashlib.sha256()
    try:
        for file in sorted(found for found in step.rglob("*") if found.is_file()):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(step).as_posix()} {size}\n".encode())
            with file.open("rb") as content:
                digest.update(content.read(PART_BYTES))
                content.seek(max(PART_BYTES, size - PART_BYTES))
                digest.update(content.read(PART_BYTES))
    except OSError as error:
        raise DataError(f"{error.filename or step}: cannot be read ({error.strerror}); make it readable") from error
    return digest.hexdigest()[:16]
