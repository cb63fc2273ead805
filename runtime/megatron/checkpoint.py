"""Checkpoints of model and optimizer: Megatron-Core's dist_checkpointing, in a form that any layout can load.

A step folder (step_folders.py) is never written twice: saving over a complete checkpoint would destroy it long before the new
one is whole. Beside the weights lies what a later stage needs to use them (model_files.py).
"""

import contextlib
import json
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.model import Model
from trainwright.runtime.megatron.model_files import (
    ModelFiles,
    SavedModel,
    check_same_model,
    files_of,
    read_model,
    write_model_files,
)
from trainwright.runtime.megatron.optimizer_state import fill_empty_state, load_optimizer
from trainwright.runtime.megatron.writers import writers_watched
from trainwright.runtime.step_folders import IDENTITY, LATEST, find_model, is_complete, remove, step_folders
from trainwright.runtime.workspace import write_json

__all__ = [
    "IDENTITY",
    "Checkpoints",
    "Found",
    "Identity",
    "ModelFiles",
    "SavedModel",
    "files_of",
    "find_model",
    "load_weights",
    "read_model",
]

# "fully_reshardable": the one form of the distributed optimizer's state that loads in every layout (0.16.1). The other key
# keeps the names of an optimizer's parts the same whether there are one or two.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to be resumed."""

    run_id: str  # of what is trained
    inputs: str  # of the data that it is trained on


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    step: int  # finished optimizer steps
    path: Path


class Checkpoints:
    """The checkpoints of one stage. All ranks call each method together; rank 0 alone touches names and old folders."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        *,
        keep_last: int,
        log: Callable[[str], None],
        files: ModelFiles,
        companions: Sequence[Path] = (),
    ) -> None:
        """`files` go along with each checkpoint; `companions`: files and folders that belong to all of these checkpoints
        and are set aside with them."""
        self._folder, self._identity, self._keep, self._log = folder, identity, max(1, keep_last), log
        self._files, self._companions = files, companions

    def prepare(self) -> Found | None:
        """The newest complete checkpoint of this run, if any. Checkpoints of another run or other inputs are moved
        aside to `<folder>-<their run_id>`; torn ones are passed over. The log says so."""
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            box[0] = self._find()
        dist.broadcast_object_list(box, src=0)
        found: Found | None = box[0]
        return found

    def save(self, model: Model, step: int) -> Path:
        """Write a checkpoint of `step` finished steps, then `latest.json`, then remove what is not kept."""
        path = self._path(step)
        if model.overlaps_param_gather:
            for chunk in model.ddp:
                chunk.start_param_sync(force_sync=True)
        if dist.get_rank() == 0:
            remove(path)  # torn, else this step would not be trained again
            path.mkdir(parents=True)
        dist.barrier()
        with _queue_in_this_process(), writers_watched():
            dist_checkpointing.save(_state(model, loading=False), str(path), content_metadata=dict(CONTENT))
        if dist.get_rank() == 0:
            write_model_files(path, model, self._files)
            write_json(
                path / IDENTITY,
                {**asdict(self._identity), "step": step, "distributed_optimizer": _is_distributed(model)},
            )
            write_json(self._folder / LATEST, {"step": step, "path": path.name})
            kept = [folder for folder in step_folders(self._folder) if is_complete(folder)][: self._keep]
            for folder in step_folders(self._folder):
                if folder not in kept:
                    remove(folder)
        return path

    def load(self, model: Model, found: Found) -> None:
        """Load model and optimizer, whatever layout saved them. Raises CheckpointError when they do not fit."""
        check_same_model(model.config, model.embedding, found.path)
        saved = _read_json(found.path / IDENTITY)
        if saved["distributed_optimizer"] != _is_distributed(model):
            kinds = {True: "the distributed optimizer", False: "the ordinary optimizer"}
            raise CheckpointError(
                f"{found.path} was saved by {kinds[saved['distributed_optimizer']]}, and this program uses "
                f"{kinds[not saved['distributed_optimizer']]}: set use_distributed_optimizer as it was"
            )
        fill_empty_state(model.optimizer)
        try:
            state = dist_checkpointing.load(_state(model, loading=True), str(found.path))
            _load_chunks(model, state)
            load_optimizer(model.optimizer, state["optimizer"])
        # CheckpointException, torch's own, is no Exception
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{found.path} does not fit this model, or is damaged: {_first_line(error)}. Delete that folder to go on "
                "from the checkpoint before it"
            ) from error

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _find(self) -> Found | None:
        for path in step_folders(self._folder):
            if not is_complete(path):
                self._log(f"checkpoint {path.name} is torn (its save was interrupted): passed over")
                continue
            saved = _read_json(path / IDENTITY)
            identity = Identity(saved["run_id"], saved["inputs"])
            if identity == self._identity:
                return Found(saved["step"], path)
            self._set_aside(identity)
            return None
        return None

    def _set_aside(self, other: Identity) -> None:
        aside = self._folder.with_name(f"{self._folder.name}-{other.run_id}")
        number = 1
        while aside.exists():
            number += 1
            aside = self._folder.with_name(f"{self._folder.name}-{other.run_id}-{number}")
        self._folder.rename(aside)
        for path in self._companions:
            if path.exists():
                path.rename(aside / path.name)
        difference = (
            f"run {other.run_id}, and this is {self._identity.run_id}"
            if other.run_id != self._identity.run_id
            else "this run on other inputs"
        )
        self._log(f"checkpoints of {difference}: moved to {aside.name}; training starts anew")


def load_weights(model: Model, folder: Path) -> None:
    """Load the weights of a step folder, whatever layout and optimizer saved them; the optimizer's state stays new.

    All ranks call it together. Raises CheckpointError for another model's, with each field that differs, and for damage.
    """
    check_same_model(model.config, model.embedding, folder)
    try:
        _load_chunks(model, dist_checkpointing.load(_weights(model), str(folder)))
    # CheckpointException, torch's own, is no Exception
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} is damaged: {_first_line(error)}. Start from another checkpoint") from error
    if model.optimizer is not None:
        model.optimizer.reload_model_params()  # the optimizer's own copies of the weights


def _weights(model: Model) -> dict[str, Any]:
    """Of each chunk. Its key is only this process's: tensors are saved by names that count layers over the whole model."""
    return {
        f"model{number}": chunk.sharded_state_dict(metadata=dict(CONTENT)) for number, chunk in enumerate(model.chunks)
    }


def _load_chunks(model: Model, state: dict[str, Any]) -> None:
    for number, chunk in enumerate(model.chunks):
        chunk.load_state_dict(state[f"model{number}"])


def _state(model: Model, *, loading: bool) -> dict[str, Any]:
    state = _weights(model)
    state["optimizer"] = model.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=dict(CONTENT))
    return state


def _is_distributed(model: Model) -> bool:
    return bool(model.ddp[0].ddp_config.use_distributed_optimizer)


@contextlib.contextmanager
def _queue_in_this_process() -> Iterator[None]:
    """Megatron-Core collects results of a save in a queue of a process that it starts by spawn, which imports everything
    anew in every rank (10 s instead of 1 s at 4 processes). A synchronous save is read in the process that wrote it."""
    original = filesystem_async._get_write_results_queue
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    try:
        yield
    finally:
        filesystem_async._get_write_results_queue = original


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete the folder that it lies in") from error
    return value


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:  # it says nothing itself: a process that failed does
        error, _ = next(iter(error.failures.values()))
    text = f"{type(error).__name__}: {error}".strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300].rstrip(".:")
