"""Pretrain a GPT on tokenised text, from random weights or another model's; measure it on held-out text; leave a checkpoint.

Leaves `work/<stage>/`: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and `output/summary.json` with the figures on the
test split. Resumes from the newest checkpoint of the same run; the order of the data depends on the step alone.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron import generate
from trainwright.runtime.megatron.batches import Batches, Ramp
from trainwright.runtime.megatron.checkpoint import Identity, ModelFiles
from trainwright.runtime.megatron.data import build_training_stream, check_length
from trainwright.runtime.megatron.job import Job, MicroBatch, declare
from trainwright.runtime.megatron.losses import text_loss
from trainwright.runtime.megatron.model import Embedding, Model
from trainwright.runtime.megatron.parallel import Parallel, check_batch, data_rank
from trainwright.runtime.megatron.parameters import PLAIN, Groups
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.megatron.schedule import Schedule, check_schedule
from trainwright.runtime.reading import ends_of_files
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.corpus import read_summary
from trainwright.runtime.stages.heldout import HeldOutText
from trainwright.runtime.stages.initial import Initial, find_beginning
from trainwright.runtime.stages.split import SPLIT_FILE
from trainwright.runtime.stages.token_files import TokenFiles
from trainwright.runtime.stages.training import Checkpoint, Session, Work, open_model, resume
from trainwright.runtime.workspace import Workspace, open_workspace

__all__ = ["Checkpoint", "Data", "Embedding", "Groups", "Initial", "Parallel", "Ramp", "Schedule", "Validation", "run"]

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50

install()  # before the program builds its configs


@dataclass(frozen=True)
class Data:
    """Stages whose outputs are read, and the batch."""

    inputs: str  # a tokenize stage
    tokenizer: str  # a tokenizer stage
    split: str  # the ingest stage that divided the documents: later stages keep to its split
    sources: tuple[str, ...]
    weights: tuple[float, ...] | None  # shares of the training tokens; None: each source in proportion to its tokens
    global_batch: int  # sequences a step
    micro_batch: int  # sequences
    ramp: Ramp | None = None  # by which the batch grows up to global_batch


@dataclass(frozen=True)
class Validation:
    """Held-out text: looked at in training, and measured whole at the end."""

    every_steps: int
    sequences: int  # of each source, each time
    baseline: str  # "bigram" | "none": what the test result is compared with
    sample_tokens: int  # length of the text sample at the end; 0: none


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
    groups: Groups = PLAIN,
    z_loss: float = 0.0,
    initial: Initial | None = None,
) -> None:
    """Train, evaluate, save. `model`, `ddp` and `optimizer` are Megatron-Core's own configs; `z_loss` weighs a penalty on the
    logits (losses.py), 0: none. `initial`: what it starts from; None: random weights.

    Raises DataError (inputs), Unsupported (what the platform or version cannot do), CheckpointError, Diverged.
    """
    batches = Batches(data.global_batch, data.ramp)
    for size in batches.sizes:
        name = "global_batch" if size == data.global_batch else "the ramp's global batch of"
        check_batch(parallel, global_batch=size, micro_batch=data.micro_batch, name=name)
    loss = text_loss(z_loss)
    job = declare(
        Job(
            parallel=parallel,
            seed=seed,
            literals=Literals(model, ddp, optimizer, layer_spec),
            embedding=embedding,
            micro_batch=MicroBatch(data.micro_batch, embedding.sequence_length),
            micro_batches=data.global_batch // (data.micro_batch * parallel.data),
            loss=loss,
            groups=groups,
        )
    )
    workspace = open_workspace()
    tokens = workspace.stage(data.inputs)
    text = HeldOutText(tokens.output, read_summary(tokens), data.sources)
    for name in (data.tokenizer, data.split):
        read_summary(workspace.stage(name))
    _check_data(workspace, data, text, embedding)
    _check_baseline(text, validation)
    check_schedule(schedule)
    files = ModelFiles(
        tokenizer=workspace.stage(data.tokenizer).output / "tokenizer.json",
        split=workspace.stage(data.split).output / SPLIT_FILE,
        chat_template="",
    )
    begin = initial and find_beginning(initial, workspace, stage, model, embedding, files.tokenizer)
    opened = open_model(job)
    inputs = _identify_inputs(workspace, data) + (f" from {begin.identity}" if begin else "")
    session = resume(opened, workspace.stage(stage), Identity(run_id, inputs), files, checkpoint)
    if begin and session.found is None:
        begin.load(opened.model)
        opened.log(f"starts from {begin.path}")
    stream = build_training_stream(
        tokens.output,
        data.sources,
        data.weights,
        steps=schedule.steps,
        sequence_length=embedding.sequence_length,
        batches=batches,
        seed=seed,
    )
    work = Work(
        steps=max(schedule.steps, session.finished),
        positions=lambda steps: batches.before(steps) * embedding.sequence_length,
        batches=lambda step: stream.batch(step, data.micro_batch, *data_rank()),
        loss=loss,
        look=lambda: text.validate(opened.model, sequences=validation.sequences, micro_batch=data.micro_batch),
        look_every=validation.every_steps,
    )
    trained = session.train(work, schedule)
    figures = _test(session, work.steps, text, data.micro_batch, validation.baseline)
    sample = _sample(session, workspace, text, data, validation, seed)
    facts = {"run_id": run_id, "step": work.steps, "sample": sample, "key_figure": _key_figure(figures)}
    session.finish({**facts, **figures}, trained.checkpoint)


def _test(session: Session, steps: int, text: HeldOutText, micro_batch: int, baseline: str) -> dict[str, float]:
    """Figures on the test split, and the baseline's."""
    figures = text.test(session.opened.model, micro_batch=micro_batch, baseline=baseline)
    for who in ("test", "bigram"):
        if f"{who}/perplexity" in figures:
            perplexity, bits = figures[f"{who}/perplexity"], figures[f"{who}/bits_per_byte"]
            session.opened.log(f"{who}: perplexity {perplexity:.1f}, {bits:.3f} bits a byte")
    session.record({"step": steps, **figures})
    return figures


def _sample(
    session: Session, workspace: Workspace, text: HeldOutText, data: Data, validation: Validation, seed: int
) -> str:
    """Text that the model writes after an end-of-text."""
    if not validation.sample_tokens:
        return ""
    model: Model = session.opened.model
    end_of_text = text.summary["end_of_text"]
    tokens = generate.sample(
        model,
        [end_of_text],
        num_tokens=validation.sample_tokens,
        end_of_text=end_of_text,
        temperature=SAMPLE_TEMPERATURE,
        top_k=SAMPLE_TOP_K,
        seed=seed,
    )
    tokenizer = Tokenizer.from_file(str(workspace.stage(data.tokenizer).output / "tokenizer.json"))
    written: str = tokenizer.decode(tokens)
    session.opened.log(f"sample: {written}")
    return written


def _check_data(workspace: Workspace, data: Data, text: HeldOutText, embedding: Embedding) -> None:
    files = TokenFiles(data.inputs, text.folder, text.summary)
    tokenizer = workspace.stage(data.tokenizer).output / "tokenizer.json"
    files.check(data.sources, vocab_size=embedding.vocab_size, tokenizer=tokenizer)
    for source in data.sources:
        check_length(source, text.summary["tokens"]["train"][source], embedding.sequence_length)


def _check_baseline(text: HeldOutText, validation: Validation) -> None:
    if validation.baseline not in ("bigram", "none"):
        raise Unsupported(f"validation.baseline={validation.baseline!r} is unknown: write 'bigram' or 'none'")
    text.check_baseline(validation.baseline)


def _identify_inputs(workspace: Workspace, data: Data) -> str:
    """16 hex digits of the token files and the tokenizer: names, sizes, and the first and last 64 KiB of each file."""
    digest = hashlib.sha256()
    if dist.get_rank() == 0:  # the one that compares
        for stage in (data.inputs, data.tokenizer):
            for part in ends_of_files(workspace.stage(stage).output):
                digest.update(part)
    return digest.hexdigest()[:16]


def _key_figure(figures: dict[str, float]) -> str:
    if "test/perplexity" not in figures:
        return "trained; no test text"
    baseline = f" (bigram {figures['bigram/perplexity']:.1f})" if "bigram/perplexity" in figures else ""
    return f"test perplexity {figures['test/perplexity']:.1f}{baseline}"
