"""Pretrain a GPT from random weights on tokenised text; measure it on held-out text; leave a checkpoint.

Leaves `work/<stage>/`: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and `output/summary.json` with the figures on the
test split. Resumes from the newest checkpoint of the same run; the order of the data depends on the step alone.
"""

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.megatron import generate, loop
from trainwright.runtime.megatron.checkpoint import Checkpoints, Identity, ModelFiles
from trainwright.runtime.megatron.data import TrainingStream, build_training_stream
from trainwright.runtime.megatron.model import Embedding, Model, build, count_parameters
from trainwright.runtime.megatron.parallel import Parallel, check_model, data_rank, start
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.megatron.schedule import LearningRate, Schedule
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.corpus import read_summary
from trainwright.runtime.stages.heldout import HeldOutText
from trainwright.runtime.stages.metrics import TENSORBOARD, Metrics
from trainwright.runtime.workspace import Progress, StageFolder, Workspace, open_workspace, write_json

__all__ = ["Checkpoint", "Data", "Embedding", "Parallel", "Schedule", "Validation", "run"]

LOG_LINES = 70  # of training progress in a log, at most
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
    held_out: HeldOutText
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
    text = HeldOutText(tokens.output, read_summary(tokens), data.sources)
    read_summary(workspace.stage(data.tokenizer))
    _check_text(text, embedding, validation)
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

    checkpoints = Checkpoints(
        folder.checkpoints,
        Identity(run_id, _identify_inputs(workspace, data)),
        keep_last=checkpoint.keep_last,
        files=ModelFiles(workspace.stage(data.tokenizer).output / "tokenizer.json", split=None, chat_template=""),
        companions=(folder.metrics, folder.path / TENSORBOARD),
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
    this = _Run(folder, text, built, data, validation, max(schedule.steps, finished), log, metrics)

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
    sample = _sample(this, workspace, seed)
    if metrics:
        metrics.close()
        facts = {"run_id": run_id, "step": this.steps, "sample": sample, "key_figure": _key_figure(figures)}
        where = str(saved.relative_to(folder.path)) if saved else ""
        write_json(folder.summary, {**facts, "checkpoint": where, **figures})
    dist.barrier()
    dist.destroy_process_group()


def _train(
    this: _Run, stream: TrainingStream, rate: LearningRate, checkpoints: Checkpoints, finished: int, save_every: int
) -> Path | None:
    """Steps `finished` + 1 to the last. Returns the last checkpoint that it wrote."""
    rank, size = data_rank()
    sequence = this.model.embedding.sequence_length
    progress = Progress(this.folder, this.steps, "steps")
    saved = None
    for step in range(finished + 1, this.steps + 1):
        learning_rate = rate.advance()
        started = time.monotonic()
        batches = stream.batch(step - 1, this.data.micro_batch, rank, size)
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
            losses = this.held_out.validate(
                this.model, sequences=this.validation.sequences, micro_batch=this.data.micro_batch
            )
            this.log(
                "  " + (", ".join(f"{name} {value:.4f}" for name, value in losses.items()) or "no validation text")
            )
            row |= losses
        this.record(row)
        if last or step % save_every == 0:
            saved = checkpoints.save(this.model, step)
        if dist.get_rank() == 0:
            progress.update(step)
    return saved


def _test(this: _Run) -> dict[str, float]:
    """Figures on the test split, and the baseline's."""
    figures = this.held_out.test(this.model, micro_batch=this.data.micro_batch, baseline=this.validation.baseline)
    for who in ("test", "bigram"):
        if f"{who}/perplexity" in figures:
            perplexity, bits = figures[f"{who}/perplexity"], figures[f"{who}/bits_per_byte"]
            this.log(f"{who}: perplexity {perplexity:.1f}, {bits:.3f} bits a byte")
    this.record({"step": this.steps, **figures})
    return figures


def _sample(this: _Run, workspace: Workspace, seed: int) -> str:
    """Text that the model writes after an end-of-text."""
    if not this.validation.sample_tokens:
        return ""
    end_of_text = this.held_out.summary["end_of_text"]
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


def _check_text(text: HeldOutText, embedding: Embedding, validation: Validation) -> None:
    vocab_size = text.summary["vocab_size"]
    if vocab_size > embedding.vocab_size:
        raise DataError(
            f"the tokenizer has {vocab_size} tokens, and the model's vocab_size is {embedding.vocab_size}: an edited program? "
            "make them the same"
        )
    text.check_baseline(validation.baseline)


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
    stated = (line.removeprefix("Expected:").strip() for line in lines if line.startswith("Expected:"))
    return f"expected: {next(stated, 'not stated')}"


def _key_figure(figures: dict[str, float]) -> str:
    if "test/perplexity" not in figures:
        return "trained; no test text"
    baseline = f" (bigram {figures['bigram/perplexity']:.1f})" if "bigram/perplexity" in figures else ""
    return f"test perplexity {figures['test/perplexity']:.1f}{baseline}"


def _print(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    return None
