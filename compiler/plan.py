"""The Plan: every decision made, and why. Frozen dataclasses of the standard library; total; JSON round-trips.

Five parts: *what is trained* (`shape`, `data`, `training`, and from it the tuning stages: `sft`, `reward`, `dpo`, `ppo`,
`grpo`), *how* (`validation`, `stages`, `evaluate`, `export`, `layout`, `kernels`), *where* (`cluster`), `reasons`, and
`estimates`. Two identities rest on `canonical` JSON: `run_id` hashes what is pretrained alone, and each tuning stage has one
that hashes what it is tuned from and how, so another layout or cluster may resume their checkpoints; a program's identity is its
code (`runtime.manifest.program_identity`).

Absence is never `None`: an empty tuple, an empty string or a word such as "none" says it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.compiler.canonical import build, canonical_json, to_plain
from trainwright.compiler.plan_stages import Dpo, Evaluate, Export, Grpo, Ppo, Reward, Sft, StagePlan, Tuned

SCHEMA_VERSION = 5
# The parts of a plan whose leaves have reasons.
DECIDED = (
    *("shape", "data", "training", "validation"),
    *("stages", "sft", "reward", "dpo", "ppo", "grpo", "evaluate", "export"),
    *("layout", "kernels", "cluster"),
)
REASON_KINDS = ("pinned", "fact", "law", "search", "derived", "default")


@dataclass(frozen=True)
class Reason:
    """Why a leaf has its value. `kind` is one of REASON_KINDS; `text` gives source and arithmetic."""

    kind: str
    text: str


@dataclass(frozen=True)
class Shape:
    """The model, as it is whatever the layout. Sizes are counts of elements."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key and value heads (GQA)
    head_dim: int
    vocab_size: int  # without padding
    gated: bool  # SwiGLU-like: three matrices in the FFN, not two
    activation: str  # "silu" | "gelu" | "gelu_tanh" | "squared_relu"
    normalization: str  # "RMSNorm" | "LayerNorm"
    norm_epsilon: float
    zero_centered_norm: bool  # a norm's weight is stored less 1 (Gemma)
    positions: str  # "rope" | "learned" | "alibi" | "none"
    rotary_base: int  # 0 without RoPE
    rotary_scaling: float  # factor of Llama 3's scaling of the rotary frequencies; 0.0: none
    no_rope_every: int  # every n-th layer has no positions (Llama 4); 0: all layers have them
    tied_embeddings: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    qk_l2_norm: bool  # queries and keys of length 1, without a weight (Llama 4)
    # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); all 0: none. With it, head_dim is the part of a
    # query or key without positions.
    q_lora_rank: int  # of the compressed queries; 0: queries are not compressed
    kv_lora_rank: int  # of the compressed keys and values
    qk_rope_head_dim: int  # the part of a query or key with positions
    v_head_dim: int
    # Mixture of experts; numbers 0, words "none": dense.
    num_experts: int
    experts_per_token: int
    expert_ffn_hidden_size: int
    shared_ffn_hidden_size: int  # of the expert that every token uses; 0: none
    first_dense_layers: int  # layers before the first mixture
    moe_every: int  # of the layers after those, every n-th is a mixture; 1: all
    router_score: str  # "softmax" | "sigmoid"
    router_pre_softmax: bool  # softmax over all experts, not over the chosen ones
    router_scaling: float  # factor of the chosen experts' scores; 1.0: none
    router_groups: int  # the experts' groups, of which the best `router_group_topk` are looked at; 0: none
    router_group_topk: int
    router_bias: bool  # experts are chosen by score + bias, which balances them without a loss (DeepSeek-V3)
    router_on_input: bool  # scores multiply the experts' inputs, not their outputs (Llama 4)
    mtp_layers: int  # multi-token prediction (DeepSeek-V3): layers that predict tokens further on; 0: none


@dataclass(frozen=True)
class Source:
    """One source of text: a glob as the user wrote it, or a connector."""

    name: str
    path: str  # "" with a connector
    connector: str  # "" with a path; "python-stdlib:code", "python-stdlib:prose"
    weight: float  # share of the training tokens; 0.0 everywhere when the mixture is "by_tokens"
    filters: str  # heuristics that drop documents: "prose" | "code" | "none"


@dataclass(frozen=True)
class Curation:
    """How ingested documents become those that are trained on."""

    exact_duplicates: bool  # dropped, within a source and across them
    near_duplicates: float  # Jaccard similarity of word shingles from which a document is dropped; 0.0: none is
    permutations: int  # of a MinHash signature
    shingle_words: int  # words a shingle
    scrub: tuple[str, ...]  # of "email", "ip", "card", "iban"


@dataclass(frozen=True)
class Data:
    root: str  # as written; "." where absent
    sources: tuple[Source, ...]
    mixture: str  # "weighted" | "by_tokens" (each source in proportion to its tokens)
    curation: Curation
    budget_tokens: int  # tokens to train on (steps x tokens a step is this, rounded to whole steps)
    validation_fraction: float  # of each source's bytes, in whole groups of documents
    test_fraction: float  # likewise
    tokenizer: str  # "byte_bpe" | "initial" (that of the initial model)


@dataclass(frozen=True)
class Training:
    context_length: int  # tokens a sequence
    precision: str  # "bf16" | "fp32"
    initial: str  # path of the model that it starts from, as written; "": random weights
    global_batch: int  # sequences a step
    tokens_per_step: int
    steps: int
    optimizer: str  # "adam" (AdamW) | "lion"
    learning_rate: float  # peak
    min_learning_rate: float
    schedule: str  # "cosine" | "linear" | "wsd" (constant, then a decay at the end) | "constant"
    warmup_steps: int
    decay_steps: int  # of wsd; 0: another schedule
    decay_style: str  # of wsd: "minus_sqrt" (1 - the root of the share that is done); "none": another schedule
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    undecayed: tuple[str, ...]  # parameters without weight decay: of "biases", "norms", "embeddings"
    clip_grad: float  # global norm
    init_std: float
    mup_width: float  # hidden_size / that of muP's base; 1.0: no muP
    hidden_dropout: float
    attention_dropout: float
    z_loss: float  # weight of the squared log of the softmax's normaliser (PaLM); 0.0: none
    balancing: str  # of experts: "none" | "aux_loss" | "seq_aux_loss" | "bias"
    aux_loss: float  # weight of the balancing loss
    bias_rate: float  # step of the routers' bias
    router_z_loss: float  # as z_loss, of the routers (ST-MoE)
    mtp_loss: float  # weight of the loss of multi-token prediction
    # Batch ramp-up: from `ramp_start` up to global_batch by `ramp_increment` sequences, over `ramp_sequences`; all 0: none.
    ramp_start: int
    ramp_increment: int
    ramp_sequences: int
    seed: int


@dataclass(frozen=True)
class Validation:
    """How the pretraining is looked at: none of it changes what is trained."""

    every_steps: int
    sequences: int  # of each source, each time
    baseline: str  # "bigram" | "none": what the held-out result is compared with
    sample_tokens: int  # length of the text sample at the end; 0: none


@dataclass(frozen=True)
class Layout:
    """The degrees. tensor x pipeline x context x data = devices; global_batch = micro_batch x micro_batches x data. The experts
    of a mixture are laid out anew: expert_tensor x expert x pipeline devices hold all of them once."""

    tensor: int
    pipeline: int
    virtual_pipeline: int  # chunks a stage; 1: not interleaved
    context: int
    expert: int
    data: int
    micro_batch: int  # sequences
    micro_batches: int  # a step and data-parallel rank
    sequence_parallel: bool
    distributed_optimizer: bool  # ZeRO-1: optimizer states sharded over data
    recompute: str  # "none" | "selective" | "full"
    padded_vocab_size: int  # vocabulary rounded up so that it divides by tensor
    expert_tensor: int = 1  # tensor-parallel degree inside an expert; 1 in a dense model
    first_stage_layers: int = 0  # 0: as many as the other stages
    last_stage_layers: int = 0
    embedding_as_layer: bool = False  # the first stage has a layer less, for the embedding
    loss_as_layer: bool = False  # the last stage has a layer less, for the output layer and the loss
    fsdp: str = "none"  # Megatron's FSDP, what it shards: "optim" | "optim_grads" | "optim_grads_params"
    recompute_modules: tuple[str, ...] = ()  # of selective: Megatron-Core's names
    recompute_method: str = "none"  # of full: "uniform" | "block"
    recompute_layers: int = 0  # of full: layers a unit (uniform) or a stage (block)


@dataclass(frozen=True)
class Kernels:
    """What changes memory or time beside the degrees; each is a literal in the program."""

    layer_spec: str  # "local" | "transformer_engine"
    params_dtype: str  # torch's name: "bfloat16" | "float32"
    bf16: bool
    grad_reduce_in_fp32: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    bias_activation_fusion: bool
    bias_dropout_fusion: bool
    masked_softmax_fusion: bool
    gradient_accumulation_fusion: bool
    apply_rope_fusion: bool
    fp8: str  # "none" | "e4m3" | "hybrid"
    fp8_recipe: str  # "none" | "delayed" | "tensorwise" | "mxfp8" | "blockwise"
    moe_dispatcher: str  # "none" (dense) | "alltoall" | "allgather"
    moe_grouped_gemm: bool  # the products of all of a device's experts in one kernel
    batch_p2p_comm: bool  # sends and receives between stages in one batch
    overlap_p2p_comm: bool  # they run beside the computation
    deallocate_pipeline_outputs: bool  # a stage's output is freed once it is sent
    checkpoint_every_steps: int
    checkpoint_keep_last: int


@dataclass(frozen=True)
class CostLine:
    """What the user pays beside the devices."""

    name: str
    amount_usd: float
    per: str  # "": once | "month"


@dataclass(frozen=True)
class Cluster:
    device: str  # a name in data/accelerators.yaml
    nodes: int
    devices_per_node: int
    price_usd_per_device_hour: float  # 0.0: not stated
    power_w: float  # a device at work
    pue: float  # power of the site / power of its computers
    carbon_kg_per_kwh: float  # CO2 equivalent
    costs: tuple[CostLine, ...]


@dataclass(frozen=True)
class Alternative:
    """Another layout that fits, as the search saw it."""

    tensor: int
    pipeline: int
    expert: int
    data: int
    micro_batch: int
    recompute: str
    step_s: float
    memory_bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int
    gradients: int
    optimizer: int  # master weights and moments, after sharding
    activations: int  # micro-batches in flight
    logits: int
    overhead: int  # context, communication buffers, fragmentation
    total: int
    capacity: int


@dataclass(frozen=True)
class Interval:
    """low to high; 0.0 to 0.0: not known, or nothing to know."""

    low: float
    high: float


@dataclass(frozen=True)
class Round:
    """One pass of the loop between limits and layout."""

    flops_per_s: float  # model FLOPs on all devices that this round was told to count on
    parameters: int
    tokens: int
    step_s: float
    reached_flops_per_s: float  # that the layout it chose reaches: what the next round counts on


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes; `assumption` says by what reckoning. All figures 0.0: not estimated."""

    name: str
    kind: str
    trained_tokens: float  # forward and backward, all passes and all networks
    scored_tokens: float  # forward alone, all networks
    generated_tokens: float
    flops: float  # model FLOPs, generation included
    train_s: float  # forward and backward passes
    generate_s: float
    device_hours: float
    cost_usd: float  # 0.0 without a price
    energy_kwh: float
    co2_kg: float
    assumption: str


@dataclass(frozen=True)
class LineEstimate:
    """A cost line over the whole pipeline."""

    name: str
    cost_usd: float
    assumption: str


@dataclass(frozen=True)
class Totals:
    """Sums of the stages that are estimated, and of the cost lines."""

    duration_s: float
    flops: float
    device_hours: float
    devices_usd: float  # 0.0 without a price
    lines_usd: float
    energy_kwh: float
    co2_kg: float
    assumption: str  # of energy and CO2


@dataclass(frozen=True)
class ModuleEstimate:
    """What one kind of module holds and does on a device."""

    module: (
        str  # "embedding" | "attention" | "ffn" | "experts" | "shared_experts" | "router" | "norms" | "mtp" | "output"
    )
    parameters: int
    flops: int


@dataclass(frozen=True)
class RankEstimate:
    """Each device of the pipeline ranks `first` to `last`. FLOPs are what it executes in a step, exactly (of an evaluation: in
    the forward pass of one micro-batch; interleaved, of as many as there are pipeline ranks)."""

    first: int
    last: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int  # tensors alive at once
    overhead_bytes: int  # what the process and its allocator hold beside them
    flops: int
    modules: tuple[ModuleEstimate, ...]


@dataclass(frozen=True)
class ProgramEstimate:
    """The program of one stage that trains or asks the model; every row of it is full."""

    stage: str
    kind: str
    ranks: tuple[RankEstimate, ...]


@dataclass(frozen=True)
class Remedy:
    """A change of the layout that needs less memory: bytes on the fullest device, seconds a step."""

    change: str
    memory_bytes: int
    step_s: float


@dataclass(frozen=True)
class Estimates:
    parameters: int  # trainable, with the vocabulary as it is
    padded_parameters: int  # with the vocabulary padded, as the devices hold it
    active_parameters: int
    model_flops_per_step: float  # Megatron's convention, no recompute, unpadded vocabulary, causal attention halved
    executed_flops_per_step: float  # what runs: recompute, padded vocabulary, causal attention halved
    predicted_loss: float  # nats a token in the law's own units; 0.0 where it would exceed a uniform guess
    law: str
    parameters_80: (
        Interval  # 80 % bands by the bootstrap of the law's data: what the same question could have been answered
    )
    tokens_80: Interval
    loss_80: Interval  # of this model
    unique_tokens: float  # that the sources hold, as stated; 0.0: not stated
    epochs: float  # training tokens / unique_tokens; 0.0: not known
    inference_flops: float  # of scaling.inference_tokens
    rounds: tuple[Round, ...]
    critical_batch_tokens: float  # tokens a step at which twice the least number of tokens is needed (kaplan2020)
    batch_overhead: (
        float  # extra tokens for the same loss, beside the batch that the law would take: a fraction; negative: fewer
    )
    step_s: float
    step_s_low: float
    step_s_high: float
    tokens_per_s: float  # all devices
    tokens_per_s_per_device: float
    mfu: float
    memory: MemoryEstimate
    train_s: float  # of the pretraining: steps x step_s; device_hours and cost_usd likewise
    device_hours: float
    cost_usd: float  # 0.0 without a price
    stages: tuple[StageEstimate, ...]
    cost_lines: tuple[LineEstimate, ...]
    totals: Totals
    warnings: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    programs: tuple[ProgramEstimate, ...]
    remedies: tuple[Remedy, ...]  # in the order in which to try them where a program does not fit


@dataclass(frozen=True)
class Plan:
    schema_version: int
    name: str
    run_id: str
    overrides: tuple[str, ...]  # what --set changed, "path=value"
    shape: Shape
    data: Data
    training: Training
    validation: Validation
    stages: tuple[StagePlan, ...]
    sft: tuple[Sft, ...]
    reward: tuple[Reward, ...]
    dpo: tuple[Dpo, ...]
    ppo: tuple[Ppo, ...]
    grpo: tuple[Grpo, ...]
    evaluate: tuple[Evaluate, ...]
    export: tuple[Export, ...]
    layout: Layout
    kernels: Kernels
    cluster: Cluster
    estimates: Estimates
    reasons: Mapping[str, Reason]  # by leaf path: "layout.tensor", "data.sources[0].weight", "stages[1].implied"


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf: dataclass fields by name, tuple items by index; an empty tuple is a leaf."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    elif isinstance(value, tuple) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}[{index}]")
    else:
        yield prefix, value


def decided_leaves(plan: Plan) -> Iterator[tuple[str, Any]]:
    """The leaves that need a reason: what is trained, how, where."""
    for part in DECIDED:
        yield from leaves(getattr(plan, part), part)


def round_leaf(value: float) -> float:
    """6 significant digits: what a float leaf holds, so that another CPU gives the same bytes."""
    return float(f"{value:.6g}")


def trained_identity(shape: Shape, data: Data, training: Training) -> str:
    """`run_id`: 8 hex digits of what is pretrained. Paths count as written; which other stages there are does not count."""
    return _identity({"shape": shape, "data": data, "training": training})


def tuned_identity(initial: str, shape: Shape, data: Data, training: Training, tuned: Tuned, reward: str = "") -> str:
    """A tuning stage's `run_id`: 8 hex digits of what is tuned, on what, and how. Its layout, cadence, name and assumed volume do
    not count.

    `initial`: the `run_id` of the stage that it starts from, or the path as written; `reward`: likewise of what scores its
    answers, or "verifier", where it has such a setting.
    """
    settings = to_plain(tuned)
    for name in ("stage", "run_id", "volume"):
        del settings[name]
    if "reward" in settings:
        settings["reward"] = reward
    for name in ("micro_batch", "checkpoint_every_steps"):
        del settings["training"][name]
    optimizer = ("context_length", "precision", "optimizer", "beta1", "beta2", "epsilon", "clip_grad", "seed")
    return _identity(
        {
            "initial": initial,
            "shape": shape,
            "held_out": (data.validation_fraction, data.test_fraction),
            "optimizer": {name: getattr(training, name) for name in optimizer},
            "kind": type(tuned).__name__,
            "settings": settings,
        }
    )


def _identity(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:8]


def write_plan(plan: Plan) -> str:
    """`plan.json`: canonical content, indented for people."""
    return json.dumps(to_plain(plan), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_plan(text: str) -> Plan:
    """The inverse of `write_plan`. Raises ValueError where the text is no plan, or one of another version."""
    raw = json.loads(text)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version is None:
        raise ValueError("it is no plan: it has no schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version!r}; this trainwright reads version {SCHEMA_VERSION}")
    plan: Plan = build(Plan, raw)
    return plan
