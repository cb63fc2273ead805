"""Direct preference optimisation (Rafailov et al. 2023): raise chosen answers over rejected ones, held near a frozen reference.

The reference is the model that the stage starts from. It never changes, so its log-probabilities are computed once, before the
first step, and kept in `data/`. A row holds whole pairs, chosen beside rejected, each answer attending to itself and its prompt
alone. Leaves what `sft` leaves. Resumes from the newest checkpoint of the same run.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.job import Job, declare
from trainwright.runtime.megatron.losses import preference_loss
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.packing import pack
from trainwright.runtime.megatron.parallel import Parallel, check_batch, data_rank
from trainwright.runtime.megatron.parameters import PLAIN, Groups
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.stages import preferences, stage_verb
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer
from trainwright.runtime.stages.examples import Examples, PackedStream, save_array, write_examples, write_packs
from trainwright.runtime.stages.records import load_preferences
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

__all__ = ["Checkpoint", "Data", "Embedding", "Groups", "Parallel", "Preference", "Training", "run"]

install()  # before the program builds its configs

REFERENCE_FILE = "reference.npy"
SCORED_AT_ONCE = 4096  # answers by the reference: bounds what is held of them


@dataclass(frozen=True)
class Data:
    """Pairs of answers: files or a connector, one of the two; and what becomes of those longer than the context."""

    path: str
    connector: str
    too_long: str  # "truncate" (the answers' ends) | "drop" (the pair)
    validation: float  # shares of the records, where the initial model brings no split
    test: float


@dataclass(frozen=True)
class Preference:
    """Loss of a pair: -log sigmoid(beta x margin) + nll x the chosen answer's nats a token."""

    beta: float  # strength of the pull to the reference (1 / nats)
    nll: float  # weight of the likelihood of the chosen answer; 0: the plain loss


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
    preference: Preference,
    training: Training,
    checkpoint: Checkpoint,
    groups: Groups = PLAIN,
) -> None:
    """Align the newest checkpoint of `initial` (a stage, or a path). The configs are Megatron-Core's own.

    Raises DataError (records), CheckpointError (none there, or another model's), Unsupported, Diverged.
    """
    loss = preference_loss(beta=preference.beta, nll=preference.nll)
    check_batch(parallel, global_batch=training.global_batch, micro_batch=training.micro_batch)
    job = declare(
        Job(
            parallel=parallel,
            seed=seed,
            literals=Literals(model, ddp, optimizer, layer_spec),
            embedding=embedding,
            micro_batch=training.row_of(embedding.sequence_length, sequences=2),
            micro_batches=training.global_batch // (training.micro_batch * parallel.data),
            loss=loss,
            groups=groups,
            asks_reference=True,
        )
    )
    tuning = open_tuning(stage, open_workspace(), job, initial=initial, training=training)
    facts = tuning.prepare(data, (data.path,), partial(_prepare, tuning, data, embedding.sequence_length))
    stream = tuning.stream(facts, 2 * embedding.sequence_length)  # so that every pair fits
    held = _pairs(Examples(tuning.data / "validation"))
    tuning.train(
        run_id,
        facts,
        stream,
        checkpoint,
        batches=partial(_batches, stream, _reference(tuning, stream.examples)),
        loss=loss,
        look=partial(_look, tuning, held),
        key_figure=_key_figure,
    )


def _prepare(tuning: Tuning, data: Data, limit: int, folder: Path) -> dict[str, Any]:
    """Read, render, tokenise, pack; what the other ranks need to know. On rank 0."""
    rule = split_rule(tuning, Held(data.validation, data.test))
    chat = ChatTokenizer(tuning.given.tokenizer, tuning.given.chat_template or DEFAULT_TEMPLATE)
    records = load_preferences(
        path=data.path,
        connector=data.connector,
        data_root=tuning.workspace.data_root,
        rule=rule,
        set_aside=folder / "set_aside.jsonl",
    )
    counts: Counter[str] = Counter()
    read = partial(preferences.tokenise, chat=chat, limit=limit, too_long=data.too_long)
    positions, _ = write_examples(folder / "train", chain.from_iterable(read(records.train, counts=counts)))
    validation, _ = write_examples(
        folder / "validation", chain.from_iterable(read(records.validation, counts=Counter()))
    )
    if not positions:
        raise nothing_left("pairs", records, counts)
    pairs = [chosen + rejected for chosen, rejected in zip(positions[0::2], positions[1::2], strict=True)]
    packs = pack(pairs, 2 * limit, tuning.seed)
    write_packs(folder / "train", [[place for pair in items for place in (2 * pair, 2 * pair + 1)] for items in packs])
    all_counts = {**records.counts, **counts, "trained on": len(pairs), "validation": len(validation) // 2}
    print_line(count_line("pairs", all_counts))
    return {"pad": chat.pad, "template": chat.template, "counts": all_counts}


def _reference(tuning: Tuning, examples: Examples) -> Any:
    """Summed log-probability of every training answer under the initial model: float64 [answers]. Computed once."""
    path = tuning.data / REFERENCE_FILE
    there = [path.exists()]
    dist.broadcast_object_list(there, src=0)
    if not there[0]:
        tuning.load_initial()
        count = len(examples)
        parts = (range(begin, min(begin + SCORED_AT_ONCE, count)) for begin in range(0, count, SCORED_AT_ONCE))
        scores = [score for part in parts for score in _score(tuning, [examples[index] for index in part])]
        if dist.get_rank() == 0:
            save_array(path, np.array([score.log_probability for score in scores]))
        tuning.opened.log(f"reference: log-probabilities of {count:,} answers under {tuning.begin.name}, computed once")
        dist.barrier()
    return np.load(path)


def _batches(stream: PackedStream, reference: Any, step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches, with the reference's log-probability of each answer."""
    rank, size = data_rank()
    batches = []
    for items in stream.items(step, rank, size):
        row = stream.row(items)
        known = torch.zeros(1, row["segments"].numel(), dtype=torch.float32)
        known[0, : len(items)] = torch.from_numpy(reference[items]).float()
        batches.append({**row, "reference": known})
    return batches


def _look(tuning: Tuning, held: Sequence[tuple[Tokens, Tokens]]) -> dict[str, float]:
    """On held-out pairs: how often the chosen answer has the higher summed log-probability, and its mean."""
    if not held:
        return {}
    scores = [score.log_probability for score in _score(tuning, [answer for pair in held for answer in pair])]
    chosen, rejected = np.array(scores[0::2]), np.array(scores[1::2])
    return {
        "validation/preference_accuracy": float((chosen > rejected).mean()),
        "validation/chosen_log_probability": float(chosen.mean()),
    }


def _score(tuning: Tuning, answers: Sequence[Tokens]) -> list[loop.Score]:
    model = tuning.opened.model
    row = 2 * tuning.training.micro_batch * model.embedding.sequence_length
    return loop.score_sequences(model, answers, row_tokens=row)


def _pairs(examples: Examples) -> list[tuple[Tokens, Tokens]]:
    return [(examples[2 * index], examples[2 * index + 1]) for index in glance(len(examples) // 2)]


def _key_figure(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if not after:
        return "aligned; nothing held out for validation"
    name = "validation/preference_accuracy"
    return f"validation preference accuracy {before[name]:.3f} -> {after[name]:.3f}"
