"""The folders of checkpoints: which are complete, and where a model is that something begins with. Standard library only.

checkpoints/step-000100/   complete when its metadata.json (Megatron-Core's last file) and run.json are there
checkpoints/latest.json    {"step": 100, "path": "step-000100"}, written after the save returned

Weights without a training are whole folders: a canonical checkpoint (model.json) or a Hugging Face model (config.json), each with
model.safetensors, or with the index of several such files.
"""

import shutil
from pathlib import Path

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.workspace import Workspace

LATEST = "latest.json"
IDENTITY = "run.json"
COMPLETE = "metadata.json"
CANONICAL, HUGGINGFACE = "model.json", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_model(workspace: Workspace, initial: str) -> Path:
    """The newest complete step folder of `initial`: a stage of this run, or (with a slash) a path from the data root to a
    step folder, to a `checkpoints` folder, or to a stage's folder. Raises CheckpointError, which says what is there."""
    if "/" not in initial:
        stage = workspace.stage(initial)
        return _newest(stage.checkpoints, f"stage {initial}", f"run the stage {initial} first")
    return find_step(workspace.data_root / initial)


def find_step(given: Path) -> Path:
    """The newest complete step folder of `given`: itself, or one in a `checkpoints` folder or the folder of a stage.

    Raises CheckpointError, which says what is there.
    """
    fix = "name a step folder, a checkpoints folder, or the folder of a stage that trains"
    if not given.is_dir():
        raise CheckpointError(f"{given} is not a folder: {fix}")
    if is_complete(given):
        return given
    if _looks_like_step(given):
        raise CheckpointError(
            f"{given} is torn (its save was interrupted): name the step before it, or its parent folder"
        )
    inner = given / "checkpoints"
    return _newest(inner if inner.is_dir() else given, str(given), fix)


def find_weights(given: Path) -> Path:
    """`given` where it holds whole weights, else the newest complete step folder that it leads to, as `find_step` finds it."""
    return given if is_canonical(given) or is_huggingface(given) else find_step(given)


def is_canonical(folder: Path) -> bool:
    return (folder / CANONICAL).exists() and _has_weights(folder)


def is_huggingface(folder: Path) -> bool:
    """Whether it says so: whether the weights are there as well is seen when they are read."""
    return (folder / HUGGINGFACE).exists() and not (folder / CANONICAL).exists()


def step_folders(checkpoints: Path) -> list[Path]:
    """Newest first; complete and torn ones."""
    folders = [path for path in checkpoints.glob("step-*") if _looks_like_step(path)]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).exists() and (folder / IDENTITY).exists()


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed half-way, what is left does not look complete."""
    (folder / IDENTITY).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _newest(checkpoints: Path, owner: str, fix: str) -> Path:
    folders = step_folders(checkpoints)
    for folder in folders:
        if is_complete(folder):
            return folder
    there = ", ".join(f"{folder.name} (torn)" for folder in folders)
    if not there and checkpoints.is_dir():
        there = ", ".join(sorted(path.name for path in checkpoints.iterdir())[:8])
    raise CheckpointError(f"{owner} has no complete checkpoint; {checkpoints} holds {there or 'nothing'}: {fix}")


def _looks_like_step(folder: Path) -> bool:
    return folder.name.startswith("step-") and folder.name[5:].isdigit()
