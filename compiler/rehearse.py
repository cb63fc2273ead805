"""A rehearsal: the spec of a small run on CPU processes that takes every turn of a planned one.

Sizes shrink by rule; the kinds of layers, the layout's degrees (each above 1 becomes 2, as far as the processes go), recompute,
schedule, optimizer and stages stay. What cannot be kept is listed. The data are the user's own, a sample, where they are there.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.compiler.plan import Layout, Plan, Shape
from trainwright.compiler.plan_stages import Dpo, Evaluate, Sft, StagePlan
from trainwright.compiler.rehearsal import Rehearsal
from trainwright.compiler.rehearsal_data import choose_records, choose_text

STEPS, CONTEXT, VOCABULARY = 20, 256, 1024
HEADS, HEAD_DIM, HIDDEN, FFN, EXPERT_FFN, EXPERTS, LATENT, ROPE = 4, 16, 64, 128, 64, 8, 32, 8


def rehearse(plan: Plan, data_root: Path, processes: int) -> Rehearsal:
    """The rehearsal of a plan on at most `processes` CPU processes; its data are looked for below `data_root`."""
    made = Rehearsal()
    layout = _shrink_layout(plan.layout, processes, made)
    made.spec = {
        "name": plan.name,
        "seed": plan.training.seed,
        "model": _shrink_model(plan, layout, made),
        "data": choose_text(plan, data_root, made),
        "training": _training(plan, layout, made),
        "compute": {"device": "cpu", "nodes": 1, "devices_per_node": _devices(layout)},
        "layout": layout,
        "stages": _stages(plan, data_root, layout, made),
    }
    steps = made.spec["training"].pop("steps")
    batch = int(made.spec["training"]["global_batch"].split()[0])
    made.spec["data"]["tokens"] = f"{steps * batch * made.spec['model']['context_length']} tokens"
    made.change("compute.device", plan.cluster.device, "cpu", "a rehearsal needs no accelerator")
    return made


def _shrink_layout(planned: Layout, processes: int, made: Rehearsal) -> dict[str, Any]:
    degrees = dict.fromkeys(("pipeline", "tensor", "context", "data"), 1)
    for name in degrees:
        if getattr(planned, name) > 1 and 2 * math.prod(degrees.values()) <= processes:
            degrees[name] = 2
    alone = degrees["tensor"] * degrees["context"] * degrees["data"] == 1  # experts are laid out over these
    if planned.expert > 1 and alone and 2 * math.prod(degrees.values()) <= processes:
        degrees["data"] = 2
    layout: dict[str, Any] = dict(degrees)
    shared = degrees["tensor"] * degrees["context"] * degrees["data"]
    layout["expert"] = 2 if planned.expert > 1 and shared > 1 else 1
    layout["expert_tensor"] = 2 if planned.expert_tensor > 1 and shared % (2 * layout["expert"]) == 0 else 1
    layout["virtual_pipeline"] = 2 if planned.virtual_pipeline > 1 and degrees["pipeline"] > 1 else 1
    for name in (*degrees, "expert", "expert_tensor", "virtual_pipeline"):
        why = f"each degree above 1 becomes 2, on {processes} processes"
        made.change(f"layout.{name}", getattr(planned, name), layout[name], why)
    layout["micro_batch"] = min(planned.micro_batch, 2)
    if degrees["pipeline"] > 1:
        uneven = [name for name in ("first_stage_layers", "last_stage_layers") if getattr(planned, name)]
        layout |= dict.fromkeys(uneven if layout["virtual_pipeline"] == 1 else [], 1)
        if not uneven:
            layout |= {name: True for name in ("embedding_as_layer", "loss_as_layer") if getattr(planned, name)}
    if degrees["tensor"] > 1:
        layout["sequence_parallel"] = planned.sequence_parallel
    layout |= {"distributed_optimizer": planned.distributed_optimizer, "recompute": planned.recompute}
    if planned.recompute == "selective":
        layout["recompute_modules"] = list(planned.recompute_modules)
    if planned.recompute == "full":
        layout |= {"recompute_method": planned.recompute_method, "recompute_layers": 1}
    made.change("layout.fsdp", planned.fsdp, "none", "no runtime trains with it yet")
    if not layout["expert"] > 1:
        del layout["expert"], layout["expert_tensor"]
    return layout


def _devices(layout: Mapping[str, Any]) -> int:
    return math.prod(layout[name] for name in ("pipeline", "tensor", "context", "data"))


def _shrink_model(plan: Plan, layout: Mapping[str, Any], made: Rehearsal) -> dict[str, Any]:
    planned, precision = plan.shape, plan.training.precision
    shape = _shrink_shape(planned, layout)
    model: dict[str, Any] = {
        "family": planned.family,
        "shape": shape,
        "context_length": min(plan.training.context_length, CONTEXT),
        "vocab_size": min(planned.vocab_size, VOCABULARY),
        "precision": precision,
        "positions": planned.positions,
    }
    if planned.rotary_scaling:
        model["rotary_scaling"] = planned.rotary_scaling
    if planned.mtp_layers:
        model["mtp_layers"] = 1
    if planned.num_experts:
        model["num_experts"] = min(planned.num_experts, max(EXPERTS, 2 * planned.router_groups))
        made.change("model.num_experts", planned.num_experts, model["num_experts"], "small")
    for name, value in shape.items():
        made.change(f"model.shape.{name}", getattr(planned, name), value, "small")
    for name in ("context_length", "vocab_size"):
        wanted = plan.training.context_length if name == "context_length" else planned.vocab_size
        made.change(f"model.{name}", wanted, model[name], "small")
    if plan.training.initial:
        made.change("model.initial", plan.training.initial, "random weights", "its weights are of the planned sizes")
    if plan.training.mup_width != 1.0:
        made.change("scaling.learning_rate", "mup", "the planned rate", "its base is of another width")
    if plan.kernels.fp8 != "none":
        made.change("layout.fp8", plan.kernels.fp8, "none", "8-bit products are an accelerator's")
    made.change("layout.layer_spec", plan.kernels.layer_spec, "local", "Transformer Engine needs CUDA")
    return model


def _shrink_shape(planned: Shape, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Of every kind of layer that the model has at least one, a whole number of layers in each chunk of each stage."""
    heads = min(planned.num_attention_heads, HEADS)
    groups = heads if planned.num_query_groups == planned.num_attention_heads else min(planned.num_query_groups, 2)
    first_dense = min(planned.first_dense_layers, 1)
    least = max(2, first_dense + (planned.moe_every if planned.num_experts else 0), planned.no_rope_every)
    chunks = layout["pipeline"] * layout["virtual_pipeline"]
    stands_in = bool(layout.get("embedding_as_layer")) + bool(layout.get("loss_as_layer"))
    if layout.get("first_stage_layers") or layout.get("last_stage_layers"):
        both = layout.get("first_stage_layers") and layout.get("last_stage_layers")
        layers = 2 if both else max(least, 3)  # of two stages one holds a single layer
    else:
        layers = chunks * math.ceil((least + stands_in) / chunks) - stands_in
    shape: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": heads,
        "head_dim": HEAD_DIM,
    }
    if planned.kv_lora_rank:
        shape |= {"kv_lora_rank": LATENT, "q_lora_rank": LATENT if planned.q_lora_rank else 0}
        shape |= {"qk_rope_head_dim": ROPE, "v_head_dim": HEAD_DIM}
    else:
        shape["num_query_groups"] = groups
    if planned.num_experts:
        shape |= {
            "experts_per_token": min(planned.experts_per_token, 2),
            "expert_ffn_hidden_size": EXPERT_FFN,
            "shared_ffn_hidden_size": EXPERT_FFN if planned.shared_ffn_hidden_size else 0,
            "first_dense_layers": first_dense,
            "moe_every": planned.moe_every,
        }
    return shape


def _training(plan: Plan, layout: Mapping[str, Any], made: Rehearsal) -> dict[str, Any]:
    planned = plan.training
    unit = layout["micro_batch"] * layout["data"]
    micro_batches = min(plan.layout.micro_batches, 2 * layout["pipeline"])
    if layout["virtual_pipeline"] > 1:
        micro_batches = 2 * layout["pipeline"]
    batch = unit * micro_batches
    made.change("training.global_batch", planned.global_batch, batch, "small")
    made.change("training.steps", planned.steps, STEPS, "small")
    kept = (
        *("learning_rate", "min_learning_rate", "schedule", "weight_decay", "beta1", "beta2", "epsilon", "clip_grad"),
        *("hidden_dropout", "attention_dropout", "z_loss"),
    )
    training: dict[str, Any] = {name: getattr(planned, name) for name in kept}
    training |= {"optimizer": "adamw" if planned.optimizer == "adam" else planned.optimizer}
    training |= {"undecayed": list(planned.undecayed), "warmup": "2 steps" if planned.warmup_steps else "0 steps"}
    if planned.schedule == "wsd":
        training["decay"] = "20%"
    if plan.shape.num_experts:
        training |= {"balancing": planned.balancing, "router_z_loss": planned.router_z_loss}
        if planned.balancing in ("aux_loss", "seq_aux_loss"):
            training["aux_loss"] = planned.aux_loss
        if planned.balancing == "bias":
            training["bias_rate"] = planned.bias_rate
    if plan.shape.mtp_layers:
        training["mtp_loss"] = planned.mtp_loss
    if planned.ramp_start and micro_batches > 1:
        tokens = STEPS // 4 * batch * min(planned.context_length, CONTEXT)
        training["ramp"] = {"start": unit, "increment": unit, "tokens": f"{tokens} tokens"}
    return training | {"global_batch": f"{batch} sequences", "steps": STEPS}


def _stages(plan: Plan, data_root: Path, layout: Mapping[str, Any], made: Rehearsal) -> dict[str, Any]:
    tuned: dict[str, Sft | Dpo] = {one.stage: one for one in plan.sft} | {one.stage: one for one in plan.dpo}
    evaluations = {one.stage: one for one in plan.evaluate}
    stages: dict[str, Any] = {}
    for stage in plan.stages:
        given: dict[str, Any] = {"kind": stage.kind}
        if stage.initial:
            given["from"] = stage.initial
        if stage.kind == "curate":
            curation = plan.data.curation
            given |= {"near_duplicates": curation.near_duplicates, "scrub": list(curation.scrub)}
        if stage.kind == "pretrain":
            given["baseline"] = plan.validation.baseline
        if stage.name in tuned:
            given |= _tuning(tuned[stage.name], data_root, layout, made)
        if stage.name in evaluations:
            given |= _evaluation(stage, evaluations[stage.name], data_root, made)
        stages[stage.name] = given
    return stages


def _tuning(planned: Sft | Dpo, data_root: Path, layout: Mapping[str, Any], made: Rehearsal) -> dict[str, Any]:
    kind = "sft" if isinstance(planned, Sft) else "dpo"
    given: dict[str, Any] = choose_records(planned.stage, kind, planned.path, planned.connector, data_root, made)
    rates = planned.training
    batch = 2 * layout["data"] * (layout["pipeline"] if layout["virtual_pipeline"] > 1 else 1)
    made.change(f"stages.{planned.stage}.global_batch", rates.global_batch, batch, "small")
    made.change(f"stages.{planned.stage}.epochs", rates.epochs, 1, "small")
    names = ("learning_rate", "min_learning_rate", "schedule", "weight_decay")
    given |= {name: getattr(rates, name) for name in names} | {"warmup": rates.warmup}
    given |= {"epochs": 1, "global_batch": f"{batch} sequences", "too_long": planned.too_long}
    if isinstance(planned, Dpo):
        given |= {"beta": planned.beta, "nll": planned.nll}
    elif planned.chat_template:
        template = data_root / planned.chat_template
        if template.is_file():
            made.samples[f"{planned.stage}.jinja"] = template.read_bytes()
            given["chat_template"] = f"{planned.stage}.jinja"
        else:
            made.change(
                f"stages.{planned.stage}.chat_template", planned.chat_template, "the default", "nothing is there"
            )
    return given


def _evaluation(stage: StagePlan, planned: Evaluate, data_root: Path, made: Rehearsal) -> dict[str, Any]:
    known = [name for name in planned.compare if "/" not in name]
    made.change(f"stages.{stage.name}.compare", list(planned.compare), known, "a saved model is of the planned sizes")
    tasks = {}
    for task in planned.tasks:
        name = f"{stage.name}-{task.name}"
        if task.path.endswith((".yaml", ".yml")):
            made.change(
                f"stages.{stage.name}.tasks.{task.name}", task.path, "left out", "a harness task names its own files"
            )
            continue
        tasks[task.name] = choose_records(name, "tasks", task.path, task.connector, data_root, made)
        tasks[task.name]["num_fewshot"] = task.num_fewshot  # type: ignore[assignment]
    if planned.gates:
        gates = {gate.metric: gate.threshold for gate in planned.gates}
        made.change(f"stages.{stage.name}.gates", gates, "none", "a small model trained for seconds would miss them")
    return {"compare": known, "tasks": tasks}
