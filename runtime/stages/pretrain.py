"""Pretrain a GPT from random weights on tokenised text; measure it on held-out text; leave a checkpoint.

Leaves `work/<stage>/`: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and `output/summary.json` with the figures on the
test split. Resumes from the newest checkpoint of the same run; the order of the data depends on the step alone.
"""

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron import generate, loop
from trainwright.runtime.megatron.checkpoint import Checkpoints, Identity
from trainwright.runtime.megatron.data import HeldOut, TrainingStream, build_heldout, build_training_stream
from trainwright.runtime.megatron.model import Embedding, Model, build, count_parameters
from trainwright.runtime.megatron.parallel import Parallel, check_model, data_rank, start
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.megatron.schedule import LearningRate, Schedule
from trainwright.runtime.stages import bigram, stage_verb
from trainwright.runtime.stages.corpus import read_summary
from trainwright.runtime.stages.metrics import TENSORBOARD, Metrics
from trainwright.runtime.workspace import Progress, StageFolder, Workspace, open_workspace, write_json

__all__ = ["Checkpoint", "Data", "Embedding", "Parallel", "Schedule", "Validation", "run"]

LOG_LINES = 70  # of training progress in a log, at most
EVALUATED_AT_ONCE = 64  # batches a data rank holds in memory
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50

install()  # before the program builds its configs


@dataclass(frozen=True)
class Data:
    """Stages whose outputs are read, and the batch."""

    inputs: str  # a tokenize stage
    tokenizer: str  # a tokenizer stage
    sources: tuple[str, ...]
    weights: tuple[float, ...] | None  # shares of the training tokens; None: each source in proportion to its tokens
    global_batch: int  # sequences a step
    micro_batch: int  # sequences


@dataclass(frozen=True)
class Validation:
    """Held-out text: looked at in training, and measured whole at the end."""

    every_steps: int
    sequences: int  # of each source, each time
    baseline: str  # "bigram" | "none": what the test result is compared with
    sample_tokens: int  # length of the text sample at the end; 0: none


@dataclass(frozen=True)
class Checkpoint:
    """How often to save (and at the end), and how many to keep."""

    every_steps: int
    keep_last: int


@dataclass(frozen=True)
class _Run:
    """What the parts of this stage share."""

    folder: StageFolder
    tokens: StageFolder
    model: Model
    data: Data
    validation: Validation
    steps: int
    log: Callable[[str], None]
    metrics: Metrics | None  # on rank 0

    def record(self, row: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write(row)


@stage_verb
def run(
    *,
    stage: str,
    run_id: str,
    seed: int,
    parallel: Parallel,
    model: Any,
    embedding: Embedding,
    layer_spec: str,
    ddp: Any,
    optimizer: Any,
    schedule: Schedule,
    data: Data,
    validation: Validation,
    checkpoint: Checkpoint,
) -> None:
    """Train, evaluate, save. `model`, `ddp` and `optimizer` are Megatron-Core's own configs.

    Raises DataError (inputs), Unsupported (what the platform or version cannot do), CheckpointError, Diverged.
    """
    workspace = open_workspace()
    folder, tokens = workspace.stage(stage), workspace.stage(data.inputs)
    for needed in (data.inputs, data.tokenizer):
        read_summary(workspace.stage(needed))
    platform = start(parallel, seed)
    log = _print if dist.get_rank() == 0 else _ignore
    literals, overrides = platform.adapt(Literals(model, ddp, optimizer, layer_spec))
    log(platform.describe(overrides))
    check_model(
        parallel,
        literals.model,
        sequence_length=embedding.sequence_length,
        padded_vocab_size=embedding.padded_vocab_size,
    )
    _check(parallel, data, validation)
    built = build(literals, embedding, platform)
    log(f"parameters: {count_parameters(built):,}; layout: {parallel}")
    log(_expectation())

    companions = (folder.metrics, folder.path / TENSORBOARD)
    checkpoints = Checkpoints(
        folder.checkpoints,
        Identity(run_id, _identify_inputs(workspace, data)),
        keep_last=checkpoint.keep_last,
        companions=companions,
        log=log,
    )
    found = checkpoints.prepare()
    if found:
        checkpoints.load(built, found)
        log(f"resuming after step {found.step} of {schedule.steps}, from {found.path.name}")
    finished = found.step if found else 0
    metrics = None
    if dist.get_rank() == 0:
        shutil.rmtree(folder.output, ignore_errors=True)
        metrics = Metrics(folder, finished)
    this = _Run(folder, tokens, built, data, validation, schedule.steps, log, metrics)

    rate = LearningRate(schedule, built.optimizer, literals.optimizer, finished_steps=finished)
    stream = build_training_stream(
        tokens.output,
        data.sources,
        data.weights,
        steps=schedule.steps,
        sequence_length=embedding.sequence_length,
        global_batch=data.global_batch,
        seed=seed,
    )
    saved = _train(this, stream, rate, checkpoints, finished, checkpoint.every_steps) or (found.path if found else None)
    figures = _test(this)
    this.record({"step": schedule.steps, **figures})
    sample = _sample(this, workspace, seed)
    if metrics:
        metrics.close()
        write_json(
            folder.summary,
            {
                "key_figure": _key_figure(figures),
                "run_id": run_id,
                "step": schedule.steps,
                "checkpoint": str(saved.relative_to(folder.path)) if saved else "",
                "sample": sample,
                **figures,
            },
        )
    dist.barrier()
    dist.destroy_process_group()


def _train(
    this: _Run, stream: TrainingStream, rate: LearningRate, checkpoints: Checkpoints, finished: int, save_every: int
) -> Path | None:
    """Steps `finished` + 1 to the last. Returns the last checkpoint that it wrote."""
    rank, size = data_rank()
    sequence = this.model.embedding.sequence_length
    held_out = _held_out(this, "validation")
    progress = Progress(this.folder, this.steps, "steps")
    saved = None
    for step in range(finished + 1, this.steps + 1):
        learning_rate = rate.advance()
        batches = stream.batch(step - 1, this.data.micro_batch, rank, size)
        started = time.monotonic()
        result = loop.train_step(this.model, batches)
        step_s = time.monotonic() - started
        last = step == this.steps
        row: dict[str, float] = {
            "step": step,
            "tokens": step * this.data.global_batch * sequence,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "step_s": step_s,
            "tokens_per_s": result.tokens / step_s,
            "memory_bytes": this.model.platform.memory_bytes(),
        }
        if last or step % max(1, this.steps // LOG_LINES) == 0 or step == 1:
            this.log(
                f"step {step}/{this.steps}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.3f}, "
                f"learning rate {learning_rate:.2e}, {step_s:.3f} s, {result.tokens / step_s:,.0f} tokens/s, "
                f"{row['memory_bytes'] / 2**30:.2f} GiB"
            )
        if last or step % this.validation.every_steps == 0:
            row |= _validate(this, held_out)
        this.record(row)
        if last or step % save_every == 0:
            saved = checkpoints.save(this.model, step)
        if dist.get_rank() == 0:
            progress.update(step)
    return saved


def _validate(this: _Run, held_out: dict[str, HeldOut]) -> dict[str, float]:
    """Nats a token on windows of each source, at equal distances: its documents differ."""
    losses = {}
    for source, windows in held_out.items():
        count = min(this.validation.sequences, windows.num_windows)
        nats, tokens = _score(this, windows, [index * windows.num_windows // count for index in range(count)])
        losses[f"validation/{source}"] = nats / tokens
    this.log("  validation: " + ", ".join(f"{name[11:]} {loss:.4f}" for name, loss in losses.items()))
    return losses


def _test(this: _Run) -> dict[str, float]:
    """Every token of the test split but the first of each source, and the baseline on the same tokens."""
    nats_sum, tokens_sum, figures = 0.0, 0, {}
    held_out = _held_out(this, "test")
    for source, windows in held_out.items():
        nats, tokens = _score(this, windows, range(windows.num_windows))
        nats_sum, tokens_sum = nats_sum + nats, tokens_sum + tokens
        figures[f"test/loss/{source}"] = nats / tokens
    if not tokens_sum:
        return {}
    num_bytes = sum(read_summary(this.tokens)["bytes"]["test"][source] for source in held_out)
    figures["test/perplexity"] = math.exp(nats_sum / tokens_sum)
    figures["test/bits_per_byte"] = nats_sum / math.log(2) / num_bytes
    this.log(f"test: {_both(figures, 'test')}, over {tokens_sum:,} tokens")
    if this.validation.baseline == "bigram":
        box: list[Any] = [bigram.compare(this.tokens.output, tuple(held_out)) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0)
        figures |= box[0]
        this.log(f"bigram, same tokens: {_both(figures, 'bigram')}")
    return figures


def _sample(this: _Run, workspace: Workspace, seed: int) -> str:
    """Text that the model writes after an end-of-text."""
    if not this.validation.sample_tokens:
        return ""
    end_of_text = read_summary(this.tokens)["end_of_text"]
    tokens = generate.sample(
        this.model,
        [end_of_text],
        num_tokens=this.validation.sample_tokens,
        end_of_text=end_of_text,
        temperature=SAMPLE_TEMPERATURE,
        top_k=SAMPLE_TOP_K,
        seed=seed,
    )
    tokenizer = Tokenizer.from_file(str(workspace.stage(this.data.tokenizer).output / "tokenizer.json"))
    text: str = tokenizer.decode(tokens)
    this.log(f"sample: {text}")
    return text


def _held_out(this: _Run, split: str) -> dict[str, HeldOut]:
    """The windows of each source that has something to predict in this split."""
    counts = read_summary(this.tokens)["tokens"][split]
    length = this.model.embedding.sequence_length
    return {
        source: build_heldout(this.tokens.output, split, source, sequence_length=length)
        for source in this.data.sources
        if counts[source] > 1
    }


def _score(this: _Run, windows: HeldOut, chosen: Sequence[int]) -> tuple[float, int]:
    """(nats, tokens) over the chosen windows."""
    _, data_size = data_rank()
    size = this.data.micro_batch
    at_once = size * data_size * EVALUATED_AT_ONCE
    nats_sum, tokens_sum = 0.0, 0
    for start_at in range(0, len(chosen), at_once):
        part = chosen[start_at : start_at + at_once]
        batches = [_stack(windows, part[first : first + size], size) for first in range(0, len(part), size)]
        nats, tokens = loop.evaluate_nats(this.model, batches)
        nats_sum, tokens_sum = nats_sum + nats, tokens_sum + tokens
    return nats_sum, tokens_sum


def _stack(windows: HeldOut, chosen: Sequence[int], size: int) -> loop.Batch:
    """The chosen windows, and masked ones up to `size`: all batches have one shape."""
    rows = [windows.batch(index, 1) for index in (*chosen, *[windows.num_windows] * (size - len(chosen)))]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _check(parallel: Parallel, data: Data, validation: Validation) -> None:
    share = data.micro_batch * parallel.data
    if data.global_batch % share:
        raise Unsupported(
            f"global_batch {data.global_batch} is not a multiple of micro_batch {data.micro_batch} x data "
            f"{parallel.data} = {share}"
        )
    if validation.baseline not in ("bigram", "none"):
        raise Unsupported(f"validation.baseline={validation.baseline!r} is unknown: write 'bigram' or 'none'")


def _identify_inputs(workspace: Workspace, data: Data) -> str:
    """16 hex digits of the token files and the tokenizer: names, sizes, and the first and last 64 KiB of each file."""
    digest = hashlib.sha256()
    if dist.get_rank() == 0:  # the one that compares
        for stage in (data.inputs, data.tokenizer):
            output = workspace.stage(stage).output
            for path in sorted(path for path in output.rglob("*") if path.is_file()):
                size = path.stat().st_size
                digest.update(f"{path.relative_to(output)} {size}\n".encode())
                with path.open("rb") as file:
                    digest.update(file.read(65536))
                    file.seek(max(0, size - 65536))
                    digest.update(file.read())
    return digest.hexdigest()[:16]


def _expectation() -> str:
    """The program's own `Expected:` line, to compare the first steps with."""
    lines = (sys.modules["__main__"].__doc__ or "").splitlines()
    return next((line.strip().lower() for line in lines if line.startswith("Expected:")), "expected: not stated")


def _both(figures: dict[str, float], who: str) -> str:
    return f"perplexity {figures[f'{who}/perplexity']:.1f}, {figures[f'{who}/bits_per_byte']:.3f} bits a byte"


def _key_figure(figures: dict[str, float]) -> str:
    if "test/perplexity" not in figures:
        return "trained; no test text"
    baseline = f" (bigram {figures['bigram/perplexity']:.1f})" if "bigram/perplexity" in figures else ""
    return f"test perplexity {figures['test/perplexity']:.1f}{baseline}"


def _print(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    return None
