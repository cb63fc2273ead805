"""Plan -> Bundle: the files to write, in memory. The compiler's only importer of jinja2.

A pure function: the same plan gives the same bytes. Templates name leaves of the plan and nothing else; what takes arithmetic
or a choice (texts for people, Megatron's word for ours) is made here, in `_Words`.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import jinja2

from trainwright.compiler.emit_manifest import LAUNCHER_OF_KIND, settings_of, stage_entry
from trainwright.compiler.errors import NotEmittedError
from trainwright.compiler.estimate.layouts import DEGREES
from trainwright.compiler.export_rules import FORMATS, foreign_to_export
from trainwright.compiler.plan import Layout, Plan, write_plan
from trainwright.compiler.plan_stages import Dpo, Sft, StagePlan
from trainwright.compiler.units import format_quantity, join_words
from trainwright.runtime.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    SCHEMA_VERSION,
    Manifest,
    Stage,
    file_hash,
    write_manifest,
)

EXECUTABLE = frozenset({"launch.sh"})

_ONE_PROCESS: dict[str, Any] = dict.fromkeys(DEGREES, 1) | {
    **dict.fromkeys(("first_stage_layers", "last_stage_layers"), 0),
    **dict.fromkeys(("embedding_as_layer", "loss_as_layer"), False),
}
_LINE = 88  # columns: `ruff format`'s own default, which programs keep to
_GELU, _FAST_GELU = "torch.nn.functional.gelu", "fast_gelu"
_ACTIVATION = {"silu": "torch.nn.functional.silu", "gelu": _GELU, "gelu_tanh": _FAST_GELU}
# Megatron-Core's words for how experts are balanced (TransformerConfig.moe_router_load_balancing_type).
_BALANCING = {"none": "none", "aux_loss": "aux_loss", "seq_aux_loss": "seq_aux_loss", "bias": "none"}


@dataclass(frozen=True)
class Bundle:
    """A launch bundle in memory: relative file names to content, the manifest among them."""

    manifest: Manifest
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class _Words:
    """Texts and upstream words that templates show and no plan leaf spells."""

    devices: str
    layout: str
    root: str  # plan.data.root, as `cd` takes it
    torchrun: str
    expected: str
    model: str
    tokens: str
    activation: str
    sources: tuple[str, ...]
    weights: tuple[float, ...]  # of the sources; empty: by tokens
    multi_node: bool
    last_node: int


@dataclass(frozen=True)
class _Literals:
    """Megatron-Core's words for a plan's: absence is None there (TransformerConfig of 0.16)."""

    config: str  # the class
    fast_gelu: bool  # imported: GELU by its approximation with tanh
    pipelined: bool
    chunks: int | None
    first_stage_layers: int | None
    last_stage_layers: int | None
    recompute: str | None
    recompute_modules: list[str] | None
    recompute_method: str | None
    recompute_layers: int | None
    q_lora_rank: int | None
    shared_experts: int | None
    no_rope: str  # source: a list of a 1 a layer without positions and a 0 for the others
    moe_layers: str  # source: a list of a 1 a mixture and a 0 a dense layer
    router_scaling: float | None
    router_groups: int | None
    router_group_topk: int | None
    router_z_loss: float | None
    balancing: str
    fp8: bool
    fsdp: bool
    output_multiplier: float


def emit_bundle(plan: Plan) -> Bundle:
    """The bundle of a legal plan. Raises NotEmittedError for parts of a plan that no template emits yet."""
    missing = not_emitted(plan)
    if missing:
        raise NotEmittedError("this plan cannot be compiled yet:\n" + "\n".join(f"  {line}" for line in missing))
    environment = _environment()
    words = _words(plan)
    programs = {stage.name: f"{number:02d}_{stage.name}.py" for number, stage in enumerate(plan.stages, start=1)}
    contents: dict[str, str] = {PLAN_FILE: write_plan(plan)}
    for stage in plan.stages:
        template = environment.get_template(f"{stage.kind}.py.j2")
        contents[programs[stage.name]] = template.render(**_values(plan, stage, words, programs[stage.name]))
    stages = tuple(
        stage_entry(plan, stage, programs[stage.name], contents[programs[stage.name]]) for stage in plan.stages
    )
    rows = [_row(stage) for stage in stages]
    for name in ("launch.sh", "README.md"):
        contents[name] = environment.get_template(f"{name}.j2").render(plan=plan, words=words, stages=rows)
    encoded = {name: text.encode() for name, text in sorted(contents.items())}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=plan.name,
        run_id=plan.run_id,
        data_root=plan.data.root,
        stages=stages,
        files={name: file_hash(content) for name, content in encoded.items()},
    )
    return Bundle(manifest=manifest, files={**encoded, MANIFEST_FILE: write_manifest(manifest).encode()})


def _values(plan: Plan, stage: StagePlan, words: _Words, program: str) -> dict[str, Any]:
    """What the template of a stage names."""
    given = settings_of(plan, stage)
    tuned = isinstance(given, Sft | Dpo)
    layout = plan.layout
    if stage.kind in ("evaluate", "export"):
        layout = replace(  # no backward pass
            layout, recompute="none", recompute_modules=(), recompute_method="none", recompute_layers=0
        )
    if stage.kind == "export":
        layout = replace(layout, sequence_parallel=False, **_ONE_PROCESS)
    return {
        "plan": plan,
        "stage": stage,
        "words": words,
        "program": program,
        "needs": _needs_by_kind(plan, stage),
        "given": given,
        "layout": layout,
        "megatron": _literals(plan, layout),
        "tuned": tuned,
        "rates": given.training if isinstance(given, Sft | Dpo) else plan.training,
    }


def not_emitted(plan: Plan) -> list[str]:
    """What of a plan no template emits yet, one line each; empty for a plan that compiles."""
    lines = _without_program(plan)
    nearest, foreign = foreign_to_export(plan.shape, plan.training)
    others = join_words([name for name in FORMATS if name != nearest], "and")
    lines.extend(
        f"stages.{stage.stage}: {plan.shape.family} has {', '.join(foreign)}: of the Hugging Face formats {nearest} is nearest, "
        f"and has no place for that, nor have {others}; leave the stage out, or take a family like llama, qwen3, mixtral, "
        "deepseek_v3 or gpt3"
        for stage in plan.export
        if foreign
    )
    if plan.shape.activation not in _ACTIVATION:
        lines.append(f"model: activation {plan.shape.activation} is not emitted yet; {' and '.join(_ACTIVATION)} are")
    return lines


def _without_program(plan: Plan) -> list[str]:
    """All stages of kinds that no template emits, in one line."""
    missing = {stage.name: stage.kind for stage in plan.stages if stage.kind not in LAUNCHER_OF_KIND}
    if not missing:
        return []
    kinds = list(dict.fromkeys(missing.values()))
    rest = [stage.name for stage in plan.stages if stage.name not in missing and missing.keys() & set(stage.needs)]
    none = (
        "the kind has no program yet"
        if len(kinds) == 1
        else f"the kinds {join_words(kinds, 'and')} have no program yet"
    )
    fix = "to compile the others, leave " + ("them" if len(missing) > 1 else "it") + " out of the spec"
    if rest:
        fix += f", and let {join_words(rest, 'and')} do without (from, compare)"
    named = ", ".join(f"stages.{name} ({kind})" for name, kind in missing.items())
    return [f"{named}: {none}; `trainwright plan` and `explain` cost them; {fix}"]


def _environment() -> jinja2.Environment:
    templates = files("trainwright.templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: templates.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # programs, not HTML: every value goes through py, sh, comment or markdown
    )
    environment.filters.update(
        py=python_literal, argument=tuple_argument, sh=shlex.quote, comment=_one_line, markdown=_markdown
    )
    return environment


def python_literal(value: Any) -> str:
    """Python source of a plan's value, as `ruff format` would spell it: a spec's string can never become code."""
    if isinstance(value, str):
        # JSON spells what is beyond U+FFFF as two escapes, which are two other characters in Python.
        prefer_single = '"' in value and "'" not in value
        as_python = prefer_single or (not value.isprintable() and max(value) > "\uffff")
        return repr(value) if as_python else json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, list):
        return "[" + ", ".join(python_literal(item) for item in value) + "]"
    return repr(value)


def tuple_argument(values: tuple[Any, ...], name: str, indent: int) -> str:
    """The argument `name=(...),` of a call, as `ruff format` would spell it at that indentation: an item a line, but one item
    beside its name where it fits."""
    items = [f"{python_literal(value)}," for value in values]
    if len(items) < 2:
        line = f"{name}=({''.join(items)}),"
        if not items or indent + len(line) <= _LINE:
            return line
    margin = " " * indent
    return "\n".join([f"{name}=(", *(f"{margin}    {item}" for item in items), f"{margin}),"])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    """Text in a Markdown table or between back-ticks: no bars, back-ticks or line breaks of its own; what cannot be seen is
    spelt as in Python."""
    line = _one_line(text)
    shown = line if line and line.isprintable() else python_literal(text)
    return shown.replace("|", "\\|").replace("`", "'")


def _folder(path: str) -> str:
    """A path as `cd` takes it: neither one of its options (`-`) nor a name that it looks for in CDPATH."""
    return path if path.startswith("/") or path.partition("/")[0] in (".", "..") else f"./{path}"


def _needs_by_kind(plan: Plan, stage: StagePlan) -> dict[str, str]:
    """{kind: instance} of the stages that this one reads: programs name instances, templates ask by kind."""
    kinds = {other.name: other.kind for other in plan.stages}
    return {kinds[name]: name for name in stage.needs}


def _literals(plan: Plan, layout: Layout) -> _Literals:
    shape, training = plan.shape, plan.training
    balancing = _BALANCING[training.balancing]
    if training.balancing == "bias" and training.aux_loss:  # DeepSeek-V3's, beside a small loss within each sequence
        balancing = "seq_aux_loss"
    return _Literals(
        fast_gelu=_activation(plan) == _FAST_GELU,
        config="MLATransformerConfig" if shape.kv_lora_rank else "TransformerConfig",
        pipelined=layout.pipeline > 1,
        chunks=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        first_stage_layers=layout.first_stage_layers or None,
        last_stage_layers=layout.last_stage_layers or None,
        recompute=None if layout.recompute == "none" else layout.recompute,
        recompute_modules=list(layout.recompute_modules) or None,
        recompute_method=None if layout.recompute_method == "none" else layout.recompute_method,
        recompute_layers=layout.recompute_layers or None,
        q_lora_rank=shape.q_lora_rank or None,
        shared_experts=shape.shared_ffn_hidden_size or None,
        no_rope=_pattern(0, shape.num_layers, max(shape.no_rope_every, 1)),
        moe_layers=_pattern(shape.first_dense_layers, shape.num_layers, shape.moe_every),
        router_scaling=None if shape.router_scaling == 1.0 else shape.router_scaling,
        router_groups=shape.router_groups or None,
        router_group_topk=shape.router_group_topk or None,
        router_z_loss=training.router_z_loss or None,
        balancing=balancing,
        fp8=plan.kernels.fp8 != "none",
        fsdp=layout.fsdp != "none",
        output_multiplier=1.0 / training.mup_width,
    )


def _pattern(before: int, num_layers: int, every: int) -> str:
    """A list of a 1 for every n-th layer after the first ones and a 0 for the others, as Python source."""
    rest = num_layers - before
    zeros = f"[0] * {before} + " if before else ""
    if every == 1:
        return f"{zeros}[1] * {rest}"
    period = ", ".join(["0"] * (every - 1) + ["1"])
    return f"{zeros}[{period}] * {rest // every}" + (f" + [0] * {rest % every}" if rest % every else "")


def _row(stage: Stage) -> dict[str, Any]:
    return {
        "program": stage.program,
        "name": stage.name,
        "kind": stage.kind,
        "needs": ", ".join(stage.needs) or "-",
        "processes": stage.nodes * stage.processes_per_node,
        "torchrun": stage.launcher == "torchrun",
    }


def _activation(plan: Plan) -> str:
    """Megatron-Core's fused kernel of gelu computes the approximation with tanh, and takes no other name for it."""
    activation = _ACTIVATION[plan.shape.activation]
    return _GELU if activation == _FAST_GELU and plan.kernels.bias_activation_fusion else activation


def _words(plan: Plan) -> _Words:
    cluster, estimates, layout = plan.cluster, plan.estimates, plan.layout
    devices = cluster.nodes * cluster.devices_per_node
    degrees = {name.replace("_", " "): getattr(layout, name) for name in DEGREES}
    multi_node = cluster.nodes > 1
    rendezvous = (
        f"--nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node} "
        '--rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-conf join_timeout=86400,read_timeout=86400'
        if multi_node
        else f"--standalone --nproc-per-node {cluster.devices_per_node}"
    )
    return _Words(
        devices=f"{devices:,} x {cluster.device}",
        layout=", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one device",
        root=_folder(plan.data.root),
        torchrun=f"torchrun {rendezvous}",
        expected=expected_line(plan),
        model=f"{plan.shape.family} with {estimates.parameters:,} parameters",
        tokens=f"{plan.data.budget_tokens:,}",
        activation=_activation(plan),
        sources=tuple(source.name for source in plan.data.sources),
        weights=tuple(source.weight for source in plan.data.sources) if plan.data.mixture == "weighted" else (),
        multi_node=multi_node,
        last_node=cluster.nodes - 1,
    )


def expected_line(plan: Plan) -> str:
    """What a real run's first log lines can be compared with: step time, throughput, memory, duration, cost."""
    e = plan.estimates
    memory, capacity = (format_quantity("bytes", amount) for amount in (e.memory.total, e.memory.capacity))
    parts = [
        f"{e.step_s:.3g} s a step ({e.step_s_low:.3g} to {e.step_s_high:.3g})",
        f"{e.tokens_per_s_per_device:,.0f} tokens/s a device",
        f"{memory} of {capacity}",
        format_quantity("time", e.train_s),
    ]
    if e.cost_usd:
        parts.append(format_quantity("money", e.cost_usd))
    return ", ".join(parts)
