"""What the stages that go on from a trained model share: where it is, what it is tuned on, and its figures before and after."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.megatron.checkpoint import IDENTITY, Identity, ModelFiles, files_of, find_model, load_weights
from trainwright.runtime.megatron.job import Job, MicroBatch
from trainwright.runtime.megatron.loop import Batch
from trainwright.runtime.megatron.losses import Loss
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.schedule import Schedule
from trainwright.runtime.stages.examples import Examples, PackedStream, content_id, prepare
from trainwright.runtime.stages.records import Records
from trainwright.runtime.stages.split import SPLIT_FILE, SplitRule
from trainwright.runtime.stages.training import Checkpoint, Opened, Session, Work, open_model, resume
from trainwright.runtime.workspace import StageFolder, Workspace, write_json

MOST_LOOKED_AT = 1000  # held-out examples, each time: a glance, the evaluation stage measures all
LOOKS = 4  # at held-out examples in a stage


@dataclass(frozen=True)
class Training:
    """How long and in which batches. Rows are `sequence_length` tokens long, and hold as many examples as fit."""

    epochs: int
    global_batch: int  # rows a step
    micro_batch: int  # rows
    schedule: str  # "cosine" | "linear" | "constant"
    warmup: float  # fraction of the steps

    def row_of(self, context: int, sequences: int = 1) -> MicroBatch:
        """A micro-batch is one row: `sequences` times the context for each that it counts, and at least as many sequences."""
        length = self.micro_batch * sequences
        return MicroBatch(1, length * context, segments=length)

    def over(self, steps: int) -> Schedule:
        """The schedule of a run of `steps` steps, which follow from the data."""
        # The last step of a cosine has the least rate, often 0: a single one would train nothing.
        kind = self.schedule if steps > 1 else "constant"
        return Schedule(kind, steps, min(round(self.warmup * steps), steps - 1))


@dataclass(frozen=True)
class Held:
    """The shares that are held out where the model brings no split of its own."""

    validation: float
    test: float


@dataclass(frozen=True)
class Tuning:
    """A tuning stage whose processes are joined and whose model is built, with random weights still."""

    workspace: Workspace
    folder: StageFolder
    begin: Path  # the checkpoint that it starts from
    given: ModelFiles
    opened: Opened
    training: Training
    seed: int

    @property
    def data(self) -> Path:
        """The prepared examples."""
        return self.folder.path / "data"

    @property
    def split(self) -> Path:
        """The split that the model brings, else the stage's own."""
        return self.given.split or self.data / SPLIT_FILE

    @property
    def begin_id(self) -> str:
        """16 hex digits of the run that `begin` is of: another model at the same path has others."""
        return hashlib.sha256((self.begin / IDENTITY).read_bytes()).hexdigest()[:16]

    def prepare(self, settings: object, named: Sequence[str], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """`examples.prepare` of what depends on the initial model, its context, `settings` and the user's files that the globs
        `named` name."""
        root = self.workspace.data_root
        found = {root / name for pattern in named for name in glob.glob(pattern, root_dir=root, recursive=True)}
        files = [(str(path), path.stat()) for path in sorted(found) if path.is_file()]
        wanted = [
            str(self.begin),
            self.begin_id,
            self.opened.model.embedding.sequence_length,
            dataclasses.asdict(settings),  # type: ignore[call-overload]
            [(name, status.st_size, status.st_mtime_ns) for name, status in files],
            self.seed,
        ]
        return prepare(self.data, json.dumps(wanted), make)

    def load_initial(self) -> None:
        """The initial model's weights. Raises CheckpointError where it is another model."""
        load_weights(self.opened.model, self.begin)

    def resume(self, run_id: str, files: ModelFiles, checkpoint: Checkpoint) -> Session:
        """Go on from this stage's own newest checkpoint; without one, start from the initial model's weights."""
        identity = Identity(run_id, f"{content_id(self.data)} from {self.begin_id}")
        session = resume(self.opened, self.folder, identity, files, checkpoint)
        if session.found is None:
            self.load_initial()
            self.opened.log(f"starts from {self.begin.parent.parent.name}/{self.begin.parent.name}/{self.begin.name}")
        return session

    def stream(self, facts: Mapping[str, Any], pack_length: int) -> PackedStream:
        """The prepared training examples, in rows of `pack_length` tokens."""
        return PackedStream(
            Examples(self.data / "train"),
            pack_length=pack_length,
            epochs=self.training.epochs,
            global_batch=self.training.global_batch,
            micro_batch=self.training.micro_batch,
            pad=facts["pad"],
            seed=self.seed,
        )

    def train(
        self,
        run_id: str,
        facts: Mapping[str, Any],
        stream: PackedStream,
        checkpoint: Checkpoint,
        *,
        batches: Callable[[int], Sequence[Batch]],
        loss: Loss,
        look: Callable[[], dict[str, float]],
        key_figure: Callable[[Mapping[str, float], Mapping[str, float]], str],
    ) -> None:
        """From the initial model, or where an earlier attempt stopped, to the stage's summary. `key_figure` words what `look`
        gave (before, after) the training."""
        files = dataclasses.replace(self.given, split=self.split, chat_template=facts["template"])
        session = self.resume(run_id, files, checkpoint)
        before = self.before(session, look)
        work = Work(
            steps=stream.steps,
            positions=lambda steps: steps * self.training.global_batch * stream.pack_length,
            batches=batches,
            loss=loss,
            look=look,
            look_every=max(1, stream.steps // LOOKS),
        )
        trained = session.train(work, self.training.over(work.steps))
        after = trained.figures or look()
        figures = {f"before/{name}": value for name, value in before.items()} | dict(after)
        words = key_figure(before, after) + _unused(facts["counts"])
        summary = {"run_id": run_id, "step": work.steps, "counts": facts["counts"], **figures, "key_figure": words}
        session.finish(summary, trained.checkpoint)

    def before(self, session: Session, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `measure` says of the initial model, measured once: by a resumed run it is read."""
        path = self.data / "before.json"
        box: list[Any] = [None]
        if dist.get_rank() == 0 and path.exists():
            box[0] = json.loads(path.read_text(encoding="utf-8"))
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            if session.found:  # the same examples were prepared anew, and the model is the resumed one already
                self.load_initial()
            box[0] = measure()
            if session.found:
                session.checkpoints.load(self.opened.model, session.found)
            if dist.get_rank() == 0:
                write_json(path, box[0])
        figures: dict[str, float] = box[0]
        return figures


def open_tuning(stage: str, workspace: Workspace, job: Job, *, initial: str, training: Training) -> Tuning:
    """Find the model of `initial` and open the stage. Raises CheckpointError, DataError, Unsupported."""
    begin = find_model(workspace, initial)
    if training.epochs < 1:
        raise Unsupported(f"epochs {training.epochs} is below 1")
    given = files_of(begin)
    _check_vocabulary(given, job.embedding)
    return Tuning(workspace, workspace.stage(stage), begin, given, open_model(job), training, job.seed)


def _check_vocabulary(given: ModelFiles, embedding: Embedding) -> None:
    held = Tokenizer.from_file(str(given.tokenizer)).get_vocab_size()
    if held > embedding.vocab_size:
        raise DataError(
            f"{given.tokenizer} has {held} tokens, and the model's vocab_size is {embedding.vocab_size}: start from a checkpoint "
            "of this model"
        )


def split_rule(tuning: Tuning, held: Held) -> SplitRule:
    """The split that the model was pretrained with; else one by the stated shares, written to `tuning.split`. Rank 0."""
    if tuning.given.split is not None:
        return SplitRule.read(tuning.given.split)
    rule = SplitRule(tuning.seed, held.validation, held.test, groups={})
    rule.write(tuning.split)
    return rule


def glance(count: int) -> list[int]:
    """Numbers of MOST_LOOKED_AT of `count` examples at equal distances, or of all."""
    looked_at = min(MOST_LOOKED_AT, count)
    return [index * count // looked_at for index in range(looked_at)]


def count_line(name: str, counts: dict[str, Any]) -> str:
    """Counts of records as one line of a log."""
    listed = ", ".join(
        f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in counts.items()
    )
    return f"{name}: {listed}"


def nothing_left(name: str, records: Records[Any], counts: Mapping[str, int]) -> DataError:
    """The error of a stage whose records leave nothing to train on: where they went."""
    held = len(records.validation) + len(records.test)
    became = count_line(name, {**records.counts, "held out": held, **counts})
    return DataError(f"nothing is left for training: {became}; give more, or a longer context")


def _unused(counts: Mapping[str, int]) -> str:
    """How many records were of no use, for a stage's key figure; "" where all were."""
    number = sum(count for name, count in counts.items() if name.startswith(("set aside", "dropped")))
    return f"; {number:,} of {counts['in']:,} records left out" if number else ""
