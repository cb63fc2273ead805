"""The Spec: what the user wrote, nothing added. Types, ranges and descriptions only; absent means that the planner decides.

What concerns two fields at once is in `contradictions.py`, a fact in `resolve.py`, the finished plan in `check.py`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from trainwright.compiler.spec_fields import (
    Batch,
    Budget,
    Cadence,
    Carbon,
    Deadline,
    HeldOut,
    Memory,
    Money,
    Name,
    Power,
    Price,
    Section,
    ServedTokens,
    Size,
    StageName,
    Title,
    Tokens,
    Warmup,
    section_or_empty,
)
from trainwright.compiler.spec_stages import StageSpec


class ShapeSpec(Section):
    """The model's dimensions, when they are not to be chosen."""

    num_layers: int = Field(ge=1, le=1000, description="transformer layers (count)")
    hidden_size: int = Field(ge=8, le=200_000, description="width of the residual stream (elements)")
    ffn_hidden_size: int = Field(ge=8, le=1_000_000, description="width of the feed-forward layer (elements)")
    num_attention_heads: int = Field(ge=1, le=2048, description="query heads (count)")
    num_query_groups: int | None = Field(
        default=None, ge=1, le=2048, description="key and value heads (count); absent: as many as query heads"
    )
    head_dim: int | None = Field(
        default=None,
        ge=2,
        le=1024,
        description="width of a head (elements), with latent attention without its part with positions; absent: hidden_size /"
        " num_attention_heads",
    )
    experts_per_token: int | None = Field(
        default=None, ge=1, le=1024, description="experts that a token uses (count); absent: the family's"
    )
    expert_ffn_hidden_size: int | None = Field(
        default=None,
        ge=8,
        le=1_000_000,
        description="width of an expert (elements); absent: the family's share of the FFN",
    )
    shared_ffn_hidden_size: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="width of the shared expert (elements; 0: none); absent: the family's",
    )
    first_dense_layers: int | None = Field(
        default=None, ge=0, le=1000, description="layers before the first mixture (count); absent: the family's"
    )
    moe_every: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="of the layers after those every n-th is a mixture; absent: the family's",
    )
    q_lora_rank: int | None = Field(
        default=None, ge=0, le=100_000, description="rank of compressed queries (elements; 0: not compressed)"
    )
    kv_lora_rank: int | None = Field(
        default=None, ge=8, le=100_000, description="rank of compressed keys and values (elements)"
    )
    qk_rope_head_dim: int | None = Field(
        default=None, ge=2, le=1024, description="part of a head with positions, in latent attention (elements)"
    )
    v_head_dim: int | None = Field(
        default=None, ge=2, le=1024, description="width of a head's values, in latent attention (elements)"
    )


class ModelSpec(Section):
    """What is trained."""

    family: str = Field(
        description="a known model family, such as llama: it sets norm, activation, positions and biases"
    )
    size: Size | None = Field(
        default=None,
        description="parameters (count), such as 8B, or what the family calls a published size, such as 8x7B; absent: chosen"
        " from the budget or the tokens",
    )
    shape: ShapeSpec | None = Field(
        default=None, description="dimensions, instead of a size; absent: chosen for the size"
    )
    context_length: int | None = Field(default=None, ge=16, le=10_000_000, description="tokens a sequence")
    precision: Literal["bf16", "fp32"] | None = Field(
        default=None, description="number format of parameters and activations in training"
    )
    positions: Literal["rope", "learned", "alibi", "none"] | None = Field(
        default=None, description="how positions are told; absent: as the family's"
    )
    rotary_scaling: float | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="factor by which Llama 3's scaling stretches the slow rotary frequencies, for contexts beyond 8,192 tokens"
        " (8 in Llama 3.1); absent: none",
    )
    initial: str | None = Field(
        default=None,
        min_length=1,
        description="model whose weights and tokenizer pretraining starts with: a Hugging Face folder, a canonical checkpoint, or"
        " the folder of a stage of another run; relative to data.root, kept as written; absent: random weights",
    )
    mtp_layers: int | None = Field(
        default=None, ge=0, le=8, description="layers of multi-token prediction (count); absent: none"
    )
    vocab_size: int | None = Field(
        default=None, ge=261, le=2_000_000, description="entries of the tokenizer (count), before padding"
    )
    num_experts: int | None = Field(
        default=None,
        ge=2,
        le=1024,
        description="experts a layer of a mixture of experts (count); absent: the family's, or with scaling.serving_memory those"
        " that the law finds best in it",
    )


class SourceSpec(Section):
    """One source of text: `path` or `connector`."""

    name: Name = Field(description="what reports and files call it")
    path: str | None = Field(
        default=None,
        min_length=1,
        description="file or glob of .jsonl, .jsonl.gz or .txt; relative to data.root, kept as written",
    )
    connector: Literal["python-stdlib:code", "python-stdlib:prose"] | None = Field(
        default=None,
        description="text that is made where the run happens: modules or docstrings of the Python standard library",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="share of the training tokens (any scale); absent on all sources: in proportion to their tokens",
    )
    filters: Literal["prose", "code", "none"] | None = Field(
        default=None,
        description="heuristics by which curate drops documents of low quality; absent: code for a connector of code, else prose",
    )


class DataSpec(Section):
    """What it is trained on."""

    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder that relative paths start from; absent: where the run is started",
    )
    sources: Annotated[tuple[SourceSpec, ...], Field(strict=False, min_length=1)] = Field(
        description="where the text comes from"
    )
    tokens: Tokens | None = Field(
        default=None, description="tokens to train on (count), such as 1.4T; absent: chosen from the size or the budget"
    )
    unique_tokens: Tokens | None = Field(
        default=None,
        description="tokens that the sources hold (count); a run on more sees them again, and each pass teaches less; absent: no"
        " limit",
    )
    validation: HeldOut | None = Field(
        default=None,
        description="part held out for validation (fraction of each source's bytes, in whole groups of documents)",
    )
    validation_every: Cadence | None = Field(
        default=None,
        description='how often it is validated on every source, as "1B tokens" or "500 steps"; absent: about 10 times a run',
    )
    test: HeldOut | None = Field(
        default=None,
        description="part held out for the final test (fraction of each source's bytes, in whole groups of documents)",
    )


class RampSpec(Section):
    """A batch that grows."""

    start: int = Field(ge=1, le=10_000_000, description="its first size (sequences)")
    increment: int = Field(ge=1, le=10_000_000, description="by how much it grows each time (sequences)")
    tokens: Tokens = Field(description="tokens over which it grows, at equal distances (count)")


class TrainingSpec(Section):
    """How the optimizer goes; what is absent comes from published laws and customs."""

    global_batch: Batch | None = Field(default=None, description='a step, as "4M tokens" or "512 sequences"')
    learning_rate: float | None = Field(default=None, gt=0, le=10, description="peak learning rate (per step)")
    min_learning_rate: float | None = Field(
        default=None, ge=0, le=10, description="learning rate at the end (per step)"
    )
    optimizer: Literal["adamw", "lion", "muon"] | None = Field(
        default=None,
        description="rule of the updates; absent: adamw; muon needs a package for Python 3.12 that the runtime cannot take yet",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] | None = Field(
        default=None,
        description="course of the learning rate after warm-up; wsd: constant, then a decay at the end; absent: cosine",
    )
    decay: Warmup | None = Field(
        default=None, description='wsd: the decay that ends it, as "20%" of the steps or "5000 steps"; absent: 20 %'
    )
    warmup: Warmup | None = Field(default=None, description='linear warm-up, as "2000 steps" or "3%" of the steps')
    weight_decay: float | None = Field(
        default=None, ge=0, le=10, description="decoupled weight decay of AdamW (per step, times the learning rate)"
    )
    undecayed: Annotated[tuple[Literal["biases", "norms", "embeddings"], ...], Field(strict=False)] | None = Field(
        default=None, description="parameters without weight decay; absent: biases and norms"
    )
    beta1: float | None = Field(default=None, ge=0, lt=1, description="decay of Adam's first moment (per step)")
    beta2: float | None = Field(default=None, ge=0, lt=1, description="decay of Adam's second moment (per step)")
    epsilon: float | None = Field(default=None, gt=0, le=1, description="Adam's epsilon (in units of the gradient)")
    clip_grad: float | None = Field(
        default=None, gt=0, le=1e6, description="largest global norm of the gradient (in units of the gradient)"
    )
    init_std: float | None = Field(default=None, gt=0, le=10, description="standard deviation of the initial weights")
    hidden_dropout: float | None = Field(
        default=None, ge=0, lt=1, description="share of a layer's output that is dropped; absent: 0"
    )
    attention_dropout: float | None = Field(
        default=None, ge=0, lt=1, description="share of the attention's weights that is dropped; absent: 0"
    )
    z_loss: float | None = Field(
        default=None, ge=0, le=1, description="weight of the squared log of the softmax's normaliser; absent: 0"
    )
    balancing: Literal["none", "aux_loss", "seq_aux_loss", "bias"] | None = Field(
        default=None, description="how the experts of a mixture are kept busy; absent: as the family's"
    )
    aux_loss: float | None = Field(
        default=None, ge=0, le=10, description="weight of the loss that balances experts; absent: the family's"
    )
    bias_rate: float | None = Field(
        default=None, ge=0, le=1, description="step of the bias by which a router balances experts; absent: 0.001"
    )
    router_z_loss: float | None = Field(
        default=None, ge=0, le=1, description="as z_loss, of the routers of a mixture; absent: 0"
    )
    mtp_loss: float | None = Field(
        default=None, ge=0, le=10, description="weight of the loss of multi-token prediction; absent: 0.3"
    )
    ramp: RampSpec | None = Field(
        default=None, description="a batch that grows up to global_batch; absent: it does not"
    )


class ComputeSpec(Section):
    """What it is trained with."""

    device: str = Field(description="a known device, such as h100-sxm-80gb or cpu")
    nodes: int = Field(ge=1, le=100_000, description="machines (count)")
    devices_per_node: int = Field(ge=1, le=1024, description="devices a machine (count); on cpu: processes")
    budget: Budget | None = Field(
        default=None,
        description='what may be spent: "21 days" on all devices, "$2M", "6e23 FLOPs" or "500k device-hours"',
    )


class PowerSpec(Section):
    """What the cluster draws, and what that does."""

    device: Power | None = Field(
        default=None, description="a device at work (W), such as 700 W; absent: its data sheet's figure"
    )
    pue: float | None = Field(
        default=None,
        ge=1,
        le=10,
        description="power of the site / power of its computers (power usage effectiveness); absent: 1.1, LLaMA's",
    )
    carbon: Carbon | None = Field(
        default=None,
        description="CO2 equivalent a kWh, such as 0.385 kg/kWh (LLaMA's, the USA's average); absent: that",
    )


class CostSpec(Section):
    """What the user pays beside the devices."""

    name: Title = Field(description="what the table of costs calls it (one line, to 64 characters)")
    amount: Money = Field(description='money, such as "$50k"')
    per: Literal["month"] | None = Field(
        default=None, description="paid again each month (365.25 / 12 days) that the stages take; absent: once"
    )


class ClusterSpec(Section):
    """What is particular to the user's cluster."""

    price: Price | None = Field(default=None, description='"$2.10/device-hour"; absent: no cost is shown')
    power: Annotated[PowerSpec, BeforeValidator(section_or_empty)] = Field(
        default=PowerSpec(), description="power of the cluster, for energy and CO2"
    )
    costs: Annotated[tuple[CostSpec, ...], Field(strict=False)] = Field(
        default=(), description="the user's own cost lines, added to those of the devices"
    )


class ObjectiveSpec(Section):
    """What the run is to reach."""

    target_loss: float | None = Field(
        default=None,
        gt=0,
        le=20,
        description="loss to reach at the least cost (nats a token, in the unit of scaling.law); no loss of another corpus or"
        " vocabulary compares",
    )
    deadline: Deadline | None = Field(
        default=None, description='time that the pretraining may take on all devices, such as "21 days"'
    )


RateLaw = Literal["step_law", "deepseek_llm", "porian2024", "bjorck2024", "ludziejewski2025", "mup"]


class MupSpec(Section):
    """The run whose learning rate is transferred: same depth, batch and tokens, another width."""

    hidden_size: int = Field(ge=8, le=200_000, description="its width (elements)")
    learning_rate: float = Field(gt=0, le=10, description="its best peak learning rate (per step)")
    init_std: float = Field(gt=0, le=10, description="standard deviation of its initial weights")


class ScalingSpec(Section):
    """By which laws sizes, learning rate and batch are chosen."""

    law: str | None = Field(
        default=None,
        min_length=1,
        description="a known scaling law, or a law file of `trainwright fit` (ends in .yaml; relative to the spec's folder);"
        " absent: epoch2024; with data.unique_tokens muennighoff2023, of a mixture of experts ludziejewski2025",
    )
    inference_tokens: ServedTokens | None = Field(
        default=None,
        description="tokens that the model will read and write in its life (count); a budget then pays for them too, at 2 FLOPs a"
        " parameter and token",
    )
    serving_memory: Memory | None = Field(
        default=None,
        description="memory that the weights may take where the model is served (bytes; bf16, 2 a parameter); of a mixture the"
        " number of experts follows too; absent: no limit",
    )
    learning_rate: RateLaw | None = Field(
        default=None,
        description="law of the peak learning rate; mup: transferred from the run in scaling.mup; absent: step_law",
    )
    batch: Literal["step_law", "deepseek_llm", "porian2024", "kaplan2020"] | None = Field(
        default=None,
        description="law of the global batch; kaplan2020: its critical batch; absent: that of the learning rate where it has one,"
        " else step_law",
    )
    mup: MupSpec | None = Field(default=None, description="the base run of learning_rate: mup")


class LayoutSpec(Section):
    """Pins on how the model is laid out on the devices; what is absent is searched."""

    tensor: int | None = Field(default=None, ge=1, le=1024, description="tensor-parallel degree (devices)")
    pipeline: int | None = Field(default=None, ge=1, le=1024, description="pipeline-parallel degree (devices)")
    virtual_pipeline: int | None = Field(
        default=None, ge=1, le=128, description="chunks of layers a pipeline stage holds (interleaving); absent: 1"
    )
    first_stage_layers: int | None = Field(
        default=None, ge=1, le=1000, description="layers of the first pipeline stage (count); absent: as the others"
    )
    last_stage_layers: int | None = Field(
        default=None, ge=1, le=1000, description="layers of the last pipeline stage (count); absent: as the others"
    )
    embedding_as_layer: bool | None = Field(
        default=None, description="the embedding stands for a layer of the first pipeline stage"
    )
    loss_as_layer: bool | None = Field(
        default=None, description="output layer and loss stand for a layer of the last pipeline stage"
    )
    context: int | None = Field(default=None, ge=1, le=1024, description="context-parallel degree (devices); absent: 1")
    expert: int | None = Field(
        default=None, ge=1, le=1024, description="expert-parallel degree (devices); absent: searched for mixtures"
    )
    expert_tensor: int | None = Field(
        default=None, ge=1, le=1024, description="tensor-parallel degree inside an expert (devices); absent: 1"
    )
    data: int | None = Field(default=None, ge=1, le=1_000_000, description="data-parallel degree (devices)")
    sequence_parallel: bool | None = Field(
        default=None, description="activations beside the products are split over tensor too; absent: where tensor > 1"
    )
    distributed_optimizer: bool | None = Field(
        default=None, description="optimizer states are sharded over data (ZeRO-1); absent: they are"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, le=65_536, description="sequences that a device computes at once"
    )
    recompute: Literal["none", "selective", "full"] | None = Field(
        default=None,
        description="activations computed again in the backward pass: none, modules, or whole layers",
    )
    recompute_modules: (
        Annotated[
            tuple[Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"], ...],
            Field(strict=False, min_length=1),
        ]
        | None
    ) = Field(default=None, description="of selective recompute: what is computed again; absent: core_attn")
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None,
        description="of full recompute: all layers in units of recompute_layers, or the first recompute_layers of a stage;"
        " absent: uniform",
    )
    recompute_layers: int | None = Field(
        default=None, ge=1, le=1000, description="of full recompute: layers a unit, or a stage (count); absent: 1"
    )
    fsdp: Literal["none", "optim", "optim_grads", "optim_grads_params"] | None = Field(
        default=None,
        description="Megatron's FSDP instead of the distributed optimizer, and what it shards over data; absent: none",
    )
    fp8: Literal["none", "e4m3", "hybrid"] | None = Field(
        default=None,
        description="8-bit floats in matrix products: e4m3, or hybrid (e5m2 for gradients); absent: none",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        default=None, description="how 8-bit floats are scaled; absent: delayed"
    )
    gradient_dtype: Literal["fp32", "bf16"] | None = Field(
        default=None, description="number format in which gradients are summed; absent: fp32"
    )
    layer_spec: Literal["transformer_engine", "local"] | None = Field(
        default=None,
        description="implementation of the layers; absent: transformer_engine on CUDA devices, local on cpu",
    )


class Spec(Section):
    """A training plan's specification."""

    name: Name = Field(description="what bundle, reports and plan call the run")
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1, description="seed of every random choice")
    model: ModelSpec = Field(description="what is trained")
    data: DataSpec = Field(description="what it is trained on")
    training: Annotated[TrainingSpec, BeforeValidator(section_or_empty)] = Field(
        default=TrainingSpec(), description="how the optimizer goes"
    )
    compute: ComputeSpec = Field(description="what it is trained with")
    cluster: Annotated[ClusterSpec, BeforeValidator(section_or_empty)] = Field(
        default=ClusterSpec(), description="what is particular to the cluster"
    )
    objective: Annotated[ObjectiveSpec, BeforeValidator(section_or_empty)] = Field(
        default=ObjectiveSpec(), description="what the run is to reach"
    )
    scaling: Annotated[ScalingSpec, BeforeValidator(section_or_empty)] = Field(
        default=ScalingSpec(), description="by which laws sizes are chosen"
    )
    layout: Annotated[LayoutSpec, BeforeValidator(section_or_empty)] = Field(
        default=LayoutSpec(), description="pins on the layout"
    )
    stages: dict[StageName, Annotated[StageSpec, BeforeValidator(section_or_empty)]] = Field(
        min_length=1, description="stage instances by name; stages that these need and nobody wrote are implied"
    )
