"""What makes a layout legal: a table of rules over columns. The search reads it with a million rows, `check_plan` with one.

A rule says what must hold and prints every factor and result when it doesn't. What Megatron-Core 0.16 would train wrong without a
word is refused here too, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import (
    FULL,
    MODULES,
    RECOMPUTE_METHODS,
    SELECTIVE,
    Bools,
    Layouts,
    modules_code,
)
from trainwright.compiler.estimate.placement import num_mixtures, ranks_of, stage_layers
from trainwright.compiler.plan import Layout, Shape


@dataclass(frozen=True)
class Terms:
    """What every row of a table of layouts has in common, as far as legality depends on it."""

    shape: Shape
    context_length: int  # tokens a sequence
    global_batch: int  # sequences a step
    nodes: int
    devices_per_node: int
    batch_unit: int = 0  # sequences of which every batch is a multiple, where it grows; 0: it does not


@dataclass(frozen=True)
class Rule:
    """`holds` says of each row whether it is legal; `message` says of one illegal row what is wrong, with its arithmetic."""

    name: str
    holds: Callable[[Terms, Layouts], Bools]
    message: Callable[[Terms, Layout], str]


def _ones(layouts: Layouts) -> Bools:
    return np.ones(len(layouts), dtype=np.bool_)


def _whole_chunks(num_layers: int, rows: Layouts) -> Bools:
    """Every chunk of every stage holds the same whole number of layers, with what stands for one."""
    whole = _ones(rows)
    for rank in ranks_of(rows):
        held = stage_layers(num_layers, rows, rank)
        stands_in = 1 * ((rank == 0) & rows.embedding_as_layer) + ((rank == rows.pipeline - 1) & rows.loss_as_layer)
        slots = held + np.where(rows.pipeline > 1, stands_in, 0)
        whole &= (held >= 1) & (slots % 1 == 0) & (slots % rows.virtual_pipeline == 0)
    return whole


def _explain_layers(num_layers: int, row: Layout) -> str:
    if row.first_stage_layers or row.last_stage_layers:
        stages = row.pipeline - (row.first_stage_layers > 0) - (row.last_stage_layers > 0)
        rest = num_layers - row.first_stage_layers - row.last_stage_layers
        return (
            f"num_layers {num_layers} - first_stage_layers {row.first_stage_layers} - last_stage_layers "
            f"{row.last_stage_layers} = {rest} on the {stages} other stages of pipeline {row.pipeline}, in chunks by"
            f" virtual_pipeline {row.virtual_pipeline}: each stage must hold a whole number of layers, at least one, that its"
            " chunks divide"
        )
    stands_in = " + 1 for the embedding" * row.embedding_as_layer + " + 1 for the loss" * row.loss_as_layer
    total = num_layers + row.embedding_as_layer + row.loss_as_layer
    return (
        f"num_layers {num_layers}{stands_in} / (pipeline {row.pipeline} x virtual_pipeline {row.virtual_pipeline}) = "
        f"{total / (row.pipeline * row.virtual_pipeline):.4g} layers a chunk: they must divide evenly, or first_stage_layers"
        " and last_stage_layers say how many those stages hold"
    )


def _explain_sequence(terms: Terms, row: Layout) -> str:
    chunks, ranks = 2 * row.context if row.context > 1 else 1, row.tensor if row.sequence_parallel else 1
    halves = "; each context rank has a chunk from the front and one from the back" if row.context > 1 else ""
    return (
        f"context_length {terms.context_length} / ({chunks} chunks of context {row.context} x {ranks} tensor ranks with"
        f" sequence_parallel) = {terms.context_length / (chunks * ranks):.4g} tokens: they must divide evenly{halves}"
    )


def _modules_of(shape: Shape) -> int:
    """What a model has that selective recompute can name, as bits."""
    present = {
        "core_attn": True,
        "layernorm": True,
        "mla_up_proj": shape.kv_lora_rank > 0,
        "mlp": num_mixtures(shape) < shape.num_layers,
        "moe": shape.num_experts > 0,
        "moe_act": shape.num_experts > 0,
        "shared_experts": shape.shared_ffn_hidden_size > 0,
    }
    return modules_code([name for name, there in present.items() if there])


RULES: tuple[Rule, ...] = (
    Rule(
        "devices",
        lambda terms, rows: (
            rows.tensor * rows.pipeline * rows.context * rows.data == terms.nodes * terms.devices_per_node
        ),
        lambda terms, row: (
            f"tensor {row.tensor} x pipeline {row.pipeline} x context {row.context} x data {row.data} = "
            f"{row.tensor * row.pipeline * row.context * row.data} devices, but nodes {terms.nodes} x devices_per_node "
            f"{terms.devices_per_node} = {terms.nodes * terms.devices_per_node}"
        ),
    ),
    Rule(
        "global_batch",
        lambda terms, rows: rows.micro_batch * rows.micro_batches * rows.data == terms.global_batch,
        lambda terms, row: (
            f"micro_batch {row.micro_batch} x micro_batches {row.micro_batches} x data {row.data} = "
            f"{row.micro_batch * row.micro_batches * row.data} sequences, but global_batch is {terms.global_batch}"
        ),
    ),
    Rule(
        "ramp",
        lambda terms, rows: terms.batch_unit % (rows.micro_batch * rows.data) == 0,
        lambda terms, row: (
            f"every batch of the ramp is a multiple of {terms.batch_unit} sequences, which micro_batch {row.micro_batch} x data"
            f" {row.data} = {row.micro_batch * row.data} must divide: take a training.ramp of larger start and increment"
        ),
    ),
    Rule(
        "tensor_in_node",
        lambda terms, rows: terms.devices_per_node % rows.tensor == 0,
        lambda terms, row: (
            f"devices_per_node {terms.devices_per_node} / tensor {row.tensor} = {terms.devices_per_node / row.tensor:.4g} "
            "groups a node: tensor parallelism stays inside a node, so tensor must divide devices_per_node"
        ),
    ),
    Rule(
        "heads",
        lambda terms, rows: terms.shape.num_attention_heads % rows.tensor == 0,
        lambda terms, row: (
            f"num_attention_heads {terms.shape.num_attention_heads} / tensor {row.tensor} = "
            f"{terms.shape.num_attention_heads / row.tensor:.4g} heads a device: tensor must divide the heads"
        ),
    ),
    Rule(
        # Megatron-Core would replicate fewer groups than ranks; the runtime has not been shown equal to one process there.
        "query_groups",
        lambda terms, rows: terms.shape.num_query_groups % rows.tensor == 0,
        lambda terms, row: (
            f"num_query_groups {terms.shape.num_query_groups} / tensor {row.tensor} = "
            f"{terms.shape.num_query_groups / row.tensor:.4g} key and value heads a device: tensor must divide them"
        ),
    ),
    Rule(
        "ffn",
        lambda terms, rows: terms.shape.ffn_hidden_size % rows.tensor == 0,
        lambda terms, row: (
            f"ffn_hidden_size {terms.shape.ffn_hidden_size} / tensor {row.tensor} = "
            f"{terms.shape.ffn_hidden_size / row.tensor:.4g} columns a device: tensor must divide the FFN"
        ),
    ),
    Rule(
        "layers",
        lambda terms, rows: _whole_chunks(terms.shape.num_layers, rows),
        lambda terms, row: _explain_layers(terms.shape.num_layers, row),
    ),
    Rule(
        # As Megatron-Core's TransformerConfig refuses them together.
        "stages",
        lambda _, rows: (
            ~(
                ((rows.first_stage_layers > 0) | (rows.last_stage_layers > 0))
                & (rows.embedding_as_layer | rows.loss_as_layer)
            )
            & (
                (rows.pipeline > 1)
                | (
                    (rows.first_stage_layers + rows.last_stage_layers == 0)
                    & ~rows.embedding_as_layer
                    & ~rows.loss_as_layer
                )
            )
        ),
        lambda _, row: (
            f"first_stage_layers {row.first_stage_layers}, last_stage_layers {row.last_stage_layers}, embedding_as_layer "
            f"{row.embedding_as_layer}, loss_as_layer {row.loss_as_layer} with pipeline {row.pipeline}: stages are uneven either "
            "by stated numbers of layers or by what stands for a layer, and only where pipeline > 1"
        ),
    ),
    Rule(
        "interleaving",
        lambda _, rows: (
            (rows.virtual_pipeline == 1) | ((rows.pipeline > 1) & (rows.micro_batches % rows.pipeline == 0))
        ),
        lambda _, row: (
            f"virtual_pipeline {row.virtual_pipeline} with pipeline {row.pipeline} and {row.micro_batches} micro-batches: "
            "interleaving needs pipeline > 1 and micro-batches that are a multiple of pipeline"
        ),
    ),
    Rule(
        "sequence",
        lambda terms, rows: (
            terms.context_length
            % (np.where(rows.context > 1, 2 * rows.context, 1) * np.where(rows.sequence_parallel, rows.tensor, 1))
            == 0
        ),
        _explain_sequence,
    ),
    Rule(
        "sequence_parallel",
        lambda _, rows: ~rows.sequence_parallel | (rows.tensor > 1),
        lambda _, row: f"sequence_parallel splits over tensor, and tensor is {row.tensor}: it needs tensor > 1",
    ),
    Rule(
        "experts",
        lambda terms, rows: (
            (max(terms.shape.num_experts, 1) % rows.expert == 0)
            & (rows.tensor * rows.context * rows.data % (rows.expert * rows.expert_tensor) == 0)
        ),
        lambda terms, row: (
            f"expert {row.expert} must divide num_experts {terms.shape.num_experts} (0: a dense model), and expert"
            f" {row.expert} x expert_tensor {row.expert_tensor} the devices of a pipeline stage, tensor {row.tensor} x context"
            f" {row.context} x data {row.data} = {row.tensor * row.context * row.data}"
        ),
    ),
    Rule(
        "expert_tensor",
        lambda terms, rows: (
            (rows.expert_tensor == 1)
            | ((terms.shape.num_experts > 0) & (terms.shape.expert_ffn_hidden_size % rows.expert_tensor == 0))
        ),
        lambda terms, row: (
            f"num_experts {terms.shape.num_experts}, expert_ffn_hidden_size {terms.shape.expert_ffn_hidden_size} / expert_tensor "
            f"{row.expert_tensor} = "
            f"{terms.shape.expert_ffn_hidden_size / row.expert_tensor:.4g} columns a device: expert_tensor must divide the width"
            " of an expert, and only mixtures have experts"
        ),
    ),
    Rule(
        # Megatron-Core, moe_layer.py: without sequence parallelism tensor ranks would route the same tokens twice.
        "experts_and_sequence",
        lambda terms, rows: (terms.shape.num_experts == 0) | (rows.tensor == 1) | rows.sequence_parallel,
        lambda _, row: f"a mixture with tensor {row.tensor} needs sequence_parallel: true",
    ),
    Rule(
        # Megatron-Core, TransformerConfig and TopKRouter.
        "router",
        lambda terms, rows: (
            (
                terms.shape.num_experts == 0
                or (
                    not (terms.shape.router_on_input and terms.shape.experts_per_token > 1)
                    and not (
                        terms.shape.router_score == "softmax"
                        and terms.shape.experts_per_token == 1
                        and not terms.shape.router_pre_softmax
                    )
                )
            )
            & _ones(rows)
        ),
        lambda terms, _: (
            f"experts_per_token {terms.shape.experts_per_token}: the family multiplies the input of a token's one expert by its"
            " score: take experts_per_token 1"
            if terms.shape.router_on_input
            else "experts_per_token 1: the family's softmax over the chosen experts is 1 where one is chosen, and nothing would"
            " teach the router: take experts_per_token 2 or more"
        ),
    ),
    Rule(
        # Without it Megatron-Core 0.16 doubles the gradients of the compressed queries' norm.
        "latent_and_sequence",
        lambda terms, rows: (terms.shape.kv_lora_rank == 0) | (rows.tensor == 1) | rows.sequence_parallel,
        lambda _, row: f"latent attention with tensor {row.tensor} needs sequence_parallel: true",
    ),
    Rule(
        # Megatron-Core 0.16, attention.py: it looks the layer's number up in a list of the model's own layers.
        "mtp_and_no_rope",
        lambda terms, rows: (terms.shape.mtp_layers == 0 or terms.shape.no_rope_every == 0) & _ones(rows),
        lambda terms, row: (
            f"mtp_layers {terms.shape.mtp_layers} with layers without positions (every {terms.shape.no_rope_every}):"
            " Megatron-Core 0.16 does not know which kind a layer of multi-token prediction is; leave mtp_layers out"
        ),
    ),
    Rule(
        "mtp_and_recompute",
        lambda terms, rows: (
            (terms.shape.mtp_layers == 0)
            | (rows.recompute_method != RECOMPUTE_METHODS.index("uniform"))
            | (rows.recompute_layers == 1)
        ),
        lambda terms, row: (
            f"mtp_layers {terms.shape.mtp_layers} with recompute_layers {row.recompute_layers}: Megatron-Core 0.16 recomputes"
            " multi-token prediction in units of one layer: take recompute_layers 1, or recompute_method block"
        ),
    ),
    Rule(
        "mtp_and_context",
        lambda terms, rows: (terms.shape.mtp_layers == 0) | (rows.context == 1),
        lambda terms, row: (
            f"mtp_layers {terms.shape.mtp_layers} with context {row.context}: Megatron-Core 0.16 normalises the loss of"
            " multi-token prediction by each rank's own tokens: another model is trained; take context 1"
        ),
    ),
    Rule(
        "recompute",
        lambda _, rows: (
            ((rows.recompute == SELECTIVE) == (rows.recompute_modules > 0))
            & ((rows.recompute == FULL) == (rows.recompute_layers > 0))
            & ((rows.recompute == FULL) == (rows.recompute_method > 0))
        ),
        lambda _, row: (
            f"recompute {row.recompute} with recompute_modules {', '.join(row.recompute_modules) or 'none'}, recompute_method "
            f"{row.recompute_method}, recompute_layers {row.recompute_layers}: selective names modules, full a method and layers"
        ),
    ),
    Rule(
        "recompute_modules",
        lambda terms, rows: rows.recompute_modules & ~_modules_of(terms.shape) == 0,
        lambda terms, row: (
            f"recompute_modules {', '.join(row.recompute_modules)}: this model has "
            f"{', '.join(name for bit, name in enumerate(MODULES) if _modules_of(terms.shape) >> bit & 1)}"
        ),
    ),
    Rule(
        "vocabulary",
        lambda terms, rows: (
            (rows.padded_vocab_size >= terms.shape.vocab_size) & (rows.padded_vocab_size % rows.tensor == 0)
        ),
        lambda terms, row: (
            f"padded_vocab_size {row.padded_vocab_size} must be at least vocab_size {terms.shape.vocab_size} and a multiple of "
            f"tensor {row.tensor}"
        ),
    ),
    Rule(
        "shape",
        lambda terms, rows: (
            (
                terms.shape.num_attention_heads % terms.shape.num_query_groups == 0
                and terms.shape.experts_per_token <= terms.shape.num_experts
                and (terms.shape.num_experts == 0 or terms.shape.first_dense_layers < terms.shape.num_layers)
            )
            & _ones(rows)
        ),
        lambda terms, _: (
            f"num_query_groups {terms.shape.num_query_groups} must divide num_attention_heads "
            f"{terms.shape.num_attention_heads}, experts_per_token {terms.shape.experts_per_token} be at most num_experts "
            f"{terms.shape.num_experts}, and first_dense_layers {terms.shape.first_dense_layers} be below num_layers "
            f"{terms.shape.num_layers}"
        ),
    ),
)


def legal_rows(terms: Terms, layouts: Layouts) -> Bools:
    """Which rows break no rule."""
    legal = _ones(layouts)
    for rule in RULES:
        legal &= rule.holds(terms, layouts)
    return legal


def list_violations(terms: Terms, layouts: Layouts, index: int) -> list[str]:
    """Every rule that one row breaks, as `name: arithmetic`."""
    one = layouts.take(np.array([index]))
    row = one.row(0)
    return [f"{rule.name}: {rule.message(terms, row)}" for rule in RULES if not rule.holds(terms, one)[0]]
