"""Supervised fine-tuning: train a model on conversations, by the loss on the assistant's tokens alone; leave a checkpoint.

Conversations are rendered by a chat template, tokenised, and packed: a row holds several, each of which attends to itself
alone and counts its positions from 0. Leaves `work/<stage>/`: `data/` (packed examples, and what was set aside),
`checkpoints/`, `metrics.jsonl`, `tensorboard/` and `output/summary.json`. Resumes from the newest checkpoint of the same run.
"""

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.job import Job, declare
from trainwright.runtime.megatron.losses import token_loss
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.packing import pack
from trainwright.runtime.megatron.parallel import Parallel, check_batch, data_rank
from trainwright.runtime.megatron.parameters import PLAIN, Groups
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer, fit, read_template, show
from trainwright.runtime.stages.examples import Examples, write_examples, write_packs
from trainwright.runtime.stages.records import Conversation, load_conversations
from trainwright.runtime.stages.training import Checkpoint, print_line
from trainwright.runtime.stages.tuning import (
    Held,
    Training,
    Tuning,
    count_line,
    glance,
    nothing_left,
    open_tuning,
    split_rule,
)
from trainwright.runtime.workspace import open_workspace

__all__ = ["Checkpoint", "Data", "Embedding", "Groups", "Parallel", "Training", "run"]

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
    groups: Groups = PLAIN,
) -> None:
    """Tune the newest checkpoint of `initial` (a stage, or a path). The configs are Megatron-Core's own.

    Raises DataError (records, template), CheckpointError (none there, or another model's), Unsupported, Diverged.
    """
    check_batch(parallel, global_batch=training.global_batch, micro_batch=training.micro_batch)
    job = declare(
        Job(
            parallel=parallel,
            seed=seed,
            literals=Literals(model, ddp, optimizer, layer_spec),
            embedding=embedding,
            micro_batch=training.row_of(embedding.sequence_length),
            micro_batches=training.global_batch // (training.micro_batch * parallel.data),
            loss=token_loss,
            groups=groups,
        )
    )
    tuning = open_tuning(stage, open_workspace(), job, initial=initial, training=training)
    facts = tuning.prepare(
        data, (data.path, glob.escape(data.chat_template)), partial(_prepare, tuning, data, embedding.sequence_length)
    )
    stream = tuning.stream(facts, embedding.sequence_length)
    held = Examples(tuning.data / "validation")
    rank, size = data_rank()
    tuning.train(
        run_id,
        facts,
        stream,
        checkpoint,
        batches=lambda step: stream.batches(step, rank, size),
        loss=token_loss,
        look=partial(_look, tuning, [held[index] for index in glance(len(held))]),
        key_figure=_key_figure,
    )


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
        raise nothing_left("conversations", records, counts)
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


def _key_figure(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if not after:
        return "tuned; nothing held out for validation"
    return (
        f"validation loss on the assistant's tokens {before['validation/loss']:.3f} -> {after['validation/loss']:.3f}"
    )
