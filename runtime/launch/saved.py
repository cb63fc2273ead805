"""The identity of a model that another bundle saved and a spec names by its path."""

import hashlib
from pathlib import Path

from trainwright.runtime.errors import CheckpointError, DataError
from trainwright.runtime.reading import ends_of_files
from trainwright.runtime.step_folders import find_weights


def model_id(path: Path) -> str:
    """16 hex digits of the weights in the folder `path`, or of the newest complete checkpoint that it leads to.

    Raises DataError where there is none, or it cannot be read.

    Of every file the name, the size, and the first and last 64 KiB: all of a small one, enough of a file of weights to tell two
    trainings apart. A checkpoint may hold terabytes, so that reading all of it at every `run` and `status` is out of question.
    """
    digest = hashlib.sha256()
    try:
        for part in ends_of_files(find_weights(path)):
            digest.update(part)
    except CheckpointError as error:
        raise DataError(f"{error}; where data are meant, name the files: {path / '*.jsonl'}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror}); make it readable") from error
    return digest.hexdigest()[:16]
