"""What every training stage does around its steps: open, resume, step, look at held-out data, save.

A stage calls `open_model` (processes, layout, model), then `resume` (checkpoints, metrics), then `Session.train`. What is
particular to it are the batches, the loss, and what is looked at.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.checkpoint import Checkpoints, Found, Identity, ModelFiles
from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.job import Job
from trainwright.runtime.megatron.losses import Loss
from trainwright.runtime.megatron.model import Model, build, count_parameters
from trainwright.runtime.megatron.optimizers import check_optimizer
from trainwright.runtime.megatron.parallel import check_model, start
from trainwright.runtime.megatron.platform import Literals
from trainwright.runtime.megatron.schedule import LearningRate, Schedule
from trainwright.runtime.stages.metrics import TENSORBOARD, Metrics
from trainwright.runtime.workspace import Progress, StageFolder, write_json

LOG_LINES = 70  # of training progress in a log, at most


@dataclass(frozen=True)
class Checkpoint:
    """How often to save (and at the end), and how many to keep."""

    every_steps: int
    keep_last: int


@dataclass(frozen=True)
class Opened:
    """The processes, joined in their layout, and the model with random weights."""

    literals: Literals
    model: Model
    seed: int
    log: Callable[[str], None]  # rank 0's


def open_model(job: Job) -> Opened:
    """Join the processes and build the model. Raises Unsupported where the literals contradict each other or the platform."""
    literals, embedding = job.literals, job.embedding
    check_model(
        job.parallel,
        literals.model,
        sequence_length=embedding.sequence_length,
        padded_vocab_size=embedding.padded_vocab_size,
    )
    check_optimizer(literals.optimizer)
    job.groups.check(embedding.output_multiplier)
    platform = start(job.parallel, job.seed)
    log = print_line if dist.get_rank() == 0 else _ignore
    used, overrides = platform.adapt(literals)
    log(platform.describe(overrides))
    built = build(used, embedding, platform, job.groups)
    log(f"parameters: {count_parameters(built):,}; layout: {job.parallel}")
    log(_expectation())
    return Opened(used, built, job.seed, log)


@dataclass(frozen=True)
class Work:
    """The steps of a stage: what is trained on, by which loss, and what is looked at meanwhile."""

    steps: int
    positions: Callable[[int], int]  # tokens and padding of so many first steps
    batches: Callable[[int], Sequence[loop.Batch]]  # this data rank's micro-batches of a step, counted from 0
    loss: Loss
    look: Callable[[], dict[str, float]]  # figures on validation data; all ranks call it together
    look_every: int  # steps; also after the last


@dataclass(frozen=True)
class Trained:
    """What is there when the steps are done."""

    checkpoint: Path  # of the last one
    figures: Mapping[str, float]  # of the last look; empty where an earlier attempt took it


@dataclass(frozen=True)
class Session:
    """A stage that is about to train, or to go on training."""

    folder: StageFolder
    opened: Opened
    checkpoints: Checkpoints
    found: Found | None  # the checkpoint that it goes on from
    save_every: int
    metrics: Metrics | None  # on rank 0

    @property
    def finished(self) -> int:
        return self.found.step if self.found else 0

    def record(self, row: dict[str, float]) -> None:
        """Add a row to the stage's metrics; `row["step"]` counts finished steps."""
        if self.metrics:
            self.metrics.write(row)

    def train(self, work: Work, schedule: Schedule) -> Trained:
        """Every step that is not done yet. Raises Diverged."""
        model, optimizer = self.opened.model, self.opened.literals.optimizer
        rate = LearningRate(schedule, model.optimizer, optimizer, finished_steps=self.finished)
        progress = Progress(self.folder, work.steps, "steps")
        saved = self.found.path if self.found else None
        figures: dict[str, float] = {}
        for step in range(self.finished + 1, work.steps + 1):
            learning_rate, started = rate.advance(), time.monotonic()
            result = loop.train_step(model, work.batches(step - 1), work.loss, Draws(self.opened.seed, step))
            last = step == work.steps
            row = self._row(work, step, result, learning_rate, time.monotonic() - started)
            if last or step == 1 or step % max(1, work.steps // LOG_LINES) == 0:
                self.opened.log(_describe(row, work.steps, result.figures))
            if last or step % work.look_every == 0:
                figures = work.look()
                self.opened.log(f"  {_listed(figures) or 'nothing to validate on'}")
                row |= figures
            self.record(row)
            if last or step % self.save_every == 0:
                saved = self.checkpoints.save(model, step)
            if dist.get_rank() == 0:
                progress.update(step)
        if saved is None:
            raise Unsupported(f"the schedule has {work.steps} steps: nothing to train")
        return Trained(saved, figures)

    def _row(self, work: Work, step: int, result: loop.Step, learning_rate: float, step_s: float) -> dict[str, float]:
        return {
            "step": step,
            "tokens": work.positions(step),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "step_s": step_s,
            "tokens_per_s": result.tokens / step_s,
            "memory_bytes": self.opened.model.platform.memory_bytes(),
            **result.figures,
        }

    def finish(self, summary: dict[str, Any], saved: Path) -> None:
        """Write the stage's summary, last of all, and leave the processes' group."""
        if self.metrics:
            self.metrics.close()
            where = str(saved.relative_to(self.folder.path)) if saved.is_relative_to(self.folder.path) else ""
            write_json(self.folder.summary, {**summary, "checkpoint": where})
        dist.barrier()
        dist.destroy_process_group()


def resume(
    opened: Opened, folder: StageFolder, identity: Identity, files: ModelFiles, checkpoint: Checkpoint
) -> Session:
    """Find the stage's own newest checkpoint and load it, or leave the model as it is; open the metrics.

    Raises CheckpointError where one is damaged.
    """
    checkpoints = Checkpoints(
        folder.checkpoints,
        identity,
        keep_last=checkpoint.keep_last,
        companions=(folder.metrics, folder.path / TENSORBOARD),
        files=files,
        log=opened.log,
    )
    found = checkpoints.prepare()
    if found:
        checkpoints.load(opened.model, found)
        opened.log(f"resuming after step {found.step}, from {found.path.name}")
    metrics = None
    if dist.get_rank() == 0:
        shutil.rmtree(folder.output, ignore_errors=True)
        metrics = Metrics(folder, found.step if found else 0)
    return Session(folder, opened, checkpoints, found, checkpoint.every_steps, metrics)


def _describe(row: dict[str, float], steps: int, figures: Mapping[str, float]) -> str:
    more = f", {_listed(figures)}" if figures else ""
    return (
        f"step {row['step']}/{steps}: loss {row['loss']:.4f}, gradient norm {row['grad_norm']:.3f}, "
        f"learning rate {row['learning_rate']:.2e}, {row['step_s']:.3f} s, {row['tokens_per_s']:,.0f} tokens/s, "
        f"{row['memory_bytes'] / 2**30:.2f} GiB{more}"
    )


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _expectation() -> str:
    """The program's own `Expected:` line, to compare the first steps with."""
    lines = (sys.modules["__main__"].__doc__ or "").splitlines()
    stated = (line.removeprefix("Expected:").strip() for line in lines if line.startswith("Expected:"))
    return f"expected: {next(stated, 'not stated')}"


def print_line(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    return None
