"""Supervised fine-tuning: train a model on conversations, by the loss on the assistant's tokens alone; leave a checkpoint.

Conversations are rendered by a chat template, tokenised, and packed: a row holds several, each of which attends to itself
alone and counts its positions from 0. Leaves `work/<stage>/`: `data/` (packed examples, and what was set aside),
`checkpoints/`, `metrics.jsonl`, `tensorboard/` and `output/summary.json`. Resumes from the newest checkpoint of the same run.
"""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.losses import token_loss
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.packing import pack
from trainwright.runtime.megatron.parallel import Parallel, data_rank
from trainwright.runtime.megatron.platform import install
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer, fit, read_template, show
from trainwright.runtime.stages.examples import Examples, PackedStream, write_examples, write_packs
from trainwright.runtime.stages.records import Conversation, load_conversations
from trainwright.runtime.stages.training import Checkpoint, Work, print_line
from trainwright.runtime.stages.tuning import (
    LOOKS,
    Held,
    Training,
    Tuning,
    count_line,
    glance,
    open_tuning,
    split_rule,
    unused,
)
from trainwright.runtime.workspace import open_workspace

__all__ = ["Checkpoint", "Data", "Embedding", "Parallel", "Training", "run"]

install()  # before the program builds its configs


@dataclass(frozen=True)
class Data:
    """Conversations: files or a connector, one of the two; and what becomes of those longer than the context."""

    path: str
    connector: str
    too_long: str  # "truncate" | "drop" | "split" (between turns)
    chat_template: str  # a file with a Jinja template; "": that of the initial model, else the default
    validation: float  # shares of the records, where the initial model brings no split
    test: float


@stage_verb
def run(
    *,
    stage: str,
    run_id: str,
    seed: int,
    initial: str,
    parallel: Parallel,
    model: Any,
    embedding: Embedding,
    layer_spec: str,
    ddp: Any,
    optimizer: Any,
    data: Data,
    training: Training,
    checkpoint: Checkpoint,
) -> None:
    """Tune the newest checkpoint of `initial` (a stage, or a path). The configs are Megatron-Core's own.

    Raises DataError (records, template), CheckpointError (none there, or another model's), Unsupported, Diverged.
    """
    tuning = open_tuning(
        stage,
        open_workspace(),
        initial=initial,
        seed=seed,
        parallel=parallel,
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        layer_spec=layer_spec,
        embedding=embedding,
        training=training,
    )
    facts = tuning.prepare(
        data, (data.path, glob.escape(data.chat_template)), partial(_prepare, tuning, data, embedding.sequence_length)
    )
    stream = PackedStream(
        Examples(tuning.data / "train"),
        pack_length=embedding.sequence_length,
        epochs=training.epochs,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        pad=facts["pad"],
        seed=seed,
    )
    files = replace(tuning.given, split=tuning.split, chat_template=facts["template"])
    session = tuning.resume(run_id, files, checkpoint)
    held = Examples(tuning.data / "validation")
    look = partial(_look, tuning, [held[index] for index in glance(len(held))])
    before = tuning.before(session, look)
    rank, size = data_rank()
    work = Work(
        steps=stream.steps,
        positions_per_step=training.global_batch * embedding.sequence_length,
        batches=lambda step: stream.batches(step, rank, size),
        loss=token_loss,
        look=look,
        look_every=max(1, stream.steps // LOOKS),
    )
    saved = session.train(work, training.over(work.steps))
    after = look()
    figures = {f"before/{name}": value for name, value in before.items()} | after
    summary = {"run_id": run_id, "step": work.steps, "counts": facts["counts"], **figures}
    session.finish({**summary, "key_figure": _key_figure(before, after) + unused(facts["counts"])}, saved)


def _prepare(tuning: Tuning, data: Data, limit: int, folder: Path) -> dict[str, Any]:
    """Read, render, tokenise, pack; what the other ranks need to know. On rank 0."""
    rule = split_rule(tuning, Held(data.validation, data.test))
    root = tuning.workspace.data_root
    if data.chat_template:
        path = root / data.chat_template
        chat = ChatTokenizer(tuning.given.tokenizer, read_template(path), f"the chat template {path}")
    else:
        chat = ChatTokenizer(tuning.given.tokenizer, tuning.given.chat_template or DEFAULT_TEMPLATE)
    records = load_conversations(
        path=data.path, connector=data.connector, data_root=root, rule=rule, set_aside=folder / "set_aside.jsonl"
    )
    counts: Counter[str] = Counter()
    read = partial(_tokenise, chat=chat, limit=limit, too_long=data.too_long)
    positions, targets = write_examples(folder / "train", read(records.train, counts=counts))
    validation, _ = write_examples(folder / "validation", read(records.validation, counts=Counter()))
    if not positions:
        held = len(records.validation) + len(records.test)
        became = count_line("conversations", {**records.counts, "held out": held, **counts})
        raise DataError(f"nothing is left for training: {became}; give more, or a longer context")
    packs = pack(positions, limit, tuning.seed)
    write_packs(folder / "train", packs)
    tokens = sum(positions)
    all_counts = {**records.counts, **counts, "trained on": len(positions), "validation": len(validation)}
    print_line(count_line("conversations", all_counts))
    print_line(
        f"packed {len(positions):,} conversations, {tokens:,} tokens ({targets:,} of the assistant), into {len(packs):,} rows of "
        f"{limit}: {tokens / len(packs) / limit:.0%} full"
    )
    print_line(f"an example, what counts in the loss in brackets:\n{show(chat, records.train[0].messages)}")
    return {"pad": chat.pad, "template": chat.template, "counts": all_counts}


def _tokenise(
    conversations: Sequence[Conversation], chat: ChatTokenizer, limit: int, too_long: str, counts: Counter[str]
) -> Iterator[Tokens]:
    for conversation in conversations:
        yield from fit(chat, conversation.messages, limit=limit, too_long=too_long, counts=counts)


def _look(tuning: Tuning, held: Sequence[Tokens]) -> dict[str, float]:
    """Nats a token of the assistant's, over held-out conversations."""
    model = tuning.opened.model
    row = tuning.training.micro_batch * model.embedding.sequence_length
    scores = loop.score_sequences(model, held, row_tokens=row)
    tokens = sum(score.tokens for score in scores)
    return {"validation/loss": -sum(score.log_probability for score in scores) / tokens} if tokens else {}


def _key_figure(before: dict[str, float], after: dict[str, float]) -> str:
    if not after:
        return "tuned; nothing held out for validation"
    return (
        f"validation loss on the assistant's tokens {before['validation/loss']:.3f} -> {after['validation/loss']:.3f}"
    )
