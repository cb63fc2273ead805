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
class Volume:
    """How much a tuning stage has to do: assumed where the spec does not state it, for no data is opened while a plan is made.

    It prices a stage and changes nothing of what the stage does, so it does not count in the stage's `run_id`.
    """

    examples: int  # conversations, pairs, or prompts an epoch
    prompt_tokens: int  # mean, of an example: of all turns that are not learned
    answer_tokens: int  # mean, of one answer: reward, dpo: of each of the two; ppo, grpo: of a generated one
    samples: int  # answers generated for a prompt each time that it is visited; 0: none is generated


@dataclass(frozen=True)
class TuningSchedule:
    """How long and at which rates a model is tuned. The other settings of the optimizer are those of `training`.

    A row is what a stage's kind says; of ppo and grpo it is an episode: a prompt and one generated answer, at most
    `training.context_length` tokens.
    """

    epochs: int  # over the examples (of ppo and grpo: the prompts)
    global_batch: int  # rows a step; ppo, grpo: episodes generated before the policy is updated on them
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
    volume: Volume


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
    volume: Volume


@dataclass(frozen=True)
class Reward:
    """A stage of kind reward: a model with a scalar head, tuned on pairs. Rows are those of dpo. It is no language model."""

    stage: str
    run_id: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    too_long: str  # "truncate" | "drop"
    training: TuningSchedule
    volume: Volume


@dataclass(frozen=True)
class Reinforced:
    """What ppo and grpo have in common. global_batch = prompts x samples; each batch of episodes is passed `inner_epochs` times,
    in minibatches."""

    stage: str
    run_id: str
    path: str  # of the prompts
    reward: str  # who scores an answer: a stage of kind reward, the path of such a checkpoint, or "verifier" (checkable answers)
    prompts: int  # a step
    minibatch: int  # episodes an update
    inner_epochs: int
    max_answer_tokens: int  # where generation stops
    temperature: float  # of the sampling
    kl: float  # weight of the divergence from the initial model (1 / nats); 0.0: that model is not needed
    clip: float  # largest change of a probability ratio in one update
    training: TuningSchedule
    volume: Volume


@dataclass(frozen=True)
class Ppo(Reinforced):
    """A stage of kind ppo: a second network, of the policy's shape with a scalar head, estimates the value of each token."""

    value_model: bool  # true


@dataclass(frozen=True)
class Grpo(Reinforced):
    """A stage of kind grpo: the mean of a prompt's samples stands for the value, so there is no network for it."""

    value_model: bool  # false


Tuned = Sft | Reward | Dpo | Ppo | Grpo


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
