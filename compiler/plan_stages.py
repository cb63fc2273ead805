"""The stages of a Plan: which there are, and what is decided of each kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePlan:
    """One stage instance, in executing order."""

    name: str
    kind: str
    implied: bool
    initial: str  # the model stage, or the path of a checkpoint, that it starts from; "" for kinds that start from none
    needs: tuple[str, ...]
    retries: int  # after a failure


@dataclass(frozen=True)
class TuningSchedule:
    """How long and at which rates a model is tuned. The other settings of the optimizer are those of `training`."""

    epochs: int
    global_batch: int  # rows a step
    micro_batch: int  # rows
    learning_rate: float  # peak
    min_learning_rate: float
    schedule: str  # "cosine" | "constant"
    warmup: float  # fraction of the steps
    weight_decay: float
    checkpoint_every_steps: int


@dataclass(frozen=True)
class Sft:
    """A stage of kind sft. Rows are `training.context_length` tokens, in which conversations are packed."""

    stage: str
    run_id: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    too_long: str  # "truncate" | "drop" | "split"
    chat_template: str  # "": that of the model, else the default
    training: TuningSchedule


@dataclass(frozen=True)
class Dpo:
    """A stage of kind dpo. Rows are twice `training.context_length` tokens, in which whole pairs are packed."""

    stage: str
    run_id: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    too_long: str  # "truncate" | "drop"
    beta: float  # 1 / nats
    nll: float  # weight of the chosen answer's negative log-likelihood; 0.0: none
    training: TuningSchedule


@dataclass(frozen=True)
class Records:
    """The held-out records of a tuning stage, by its name."""

    name: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    too_long: str


@dataclass(frozen=True)
class Task:
    """Multiple choice."""

    name: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    num_fewshot: int


@dataclass(frozen=True)
class Gate:
    metric: str
    threshold: float


@dataclass(frozen=True)
class Evaluate:
    """A stage of kind evaluate: what is measured of a model, and of those that it is compared with."""

    stage: str
    compare: tuple[str, ...]  # model stages or paths
    text: bool  # perplexity of the held-out text of this bundle
    conversations: tuple[Records, ...]  # loss on the assistant's tokens
    preferences: tuple[Records, ...]  # share of pairs whose chosen answer is the more probable
    tasks: tuple[Task, ...]
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Export:
    """A stage of kind export."""

    stage: str
    tolerance: float  # largest difference between a logit and Megatron-Core's
