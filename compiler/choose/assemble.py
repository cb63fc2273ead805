"""A chosen candidate -> Plan: every section, and a reason for each of their leaves."""

from trainwright.compiler.choose.candidate import Candidate
from trainwright.compiler.choose.estimates import make_estimates
from trainwright.compiler.choose.kernels import choose_kernels
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.stages import choose_stages
from trainwright.compiler.choose.training import choose_evaluation
from trainwright.compiler.facts import LossLaw
from trainwright.compiler.plan import SCHEMA_VERSION, Cluster, Data, Plan, trained_identity
from trainwright.compiler.resolve import ResolvedSpec

# Held out of each source's bytes: 12 % for the final test and 4 % for validation leave 84 % for training (custom, no law).
TEST_FRACTION, VALIDATION_FRACTION = 0.12, 0.04


def assemble_plan(spec: ResolvedSpec, law: LossLaw, chosen: Candidate) -> Plan:
    """The plan of the candidate that the loop settled on."""
    ledger, compute = chosen.ledger, spec.compute
    stages = choose_stages(spec.stages)
    for index, stage in enumerate(stages):
        written = dict(spec.stages).get(stage.name)
        place = spec.pins.get(f"stages.{stage.name}", "the spec")
        text = f"written under stages in {place}" if written else "nobody wrote it; a later stage needs it"
        for leaf in ("name", "kind", "implied"):
            ledger.note(f"stages[{index}].{leaf}", None, "pinned" if written else "derived", text)
        for leaf in [f"needs[{n}]" for n in range(len(stage.needs))] or ["needs"]:
            ledger.note(f"stages[{index}].{leaf}", None, "derived", f"what a stage of kind {stage.kind} reads")
    data = _data(spec, ledger, chosen.tokens)
    layout = chosen.layouts.ranked.row(0)
    for path, reason in chosen.layouts.reasons.items():
        ledger.note(path, None, reason.kind, reason.text, pin=path)
    kernels = choose_kernels(
        ledger,
        cuda=compute.device.kind == "cuda",
        layer_spec=spec.layout.layer_spec.values[0],
        precision=chosen.training.precision,
        shape=chosen.shape,
        layout=layout,
        steps=chosen.training.steps,
        step_s=chosen.layouts.step_s,
    )
    price = compute.price_usd_per_device_hour
    cluster = Cluster(
        device=ledger.note("cluster.device", compute.device.name, "pinned", "compute.device", pin="compute.device"),
        nodes=ledger.note("cluster.nodes", compute.nodes, "pinned", "compute.nodes", pin="compute.nodes"),
        devices_per_node=ledger.note(
            "cluster.devices_per_node", compute.devices_per_node, "pinned", "", pin="compute.devices_per_node"
        ),
        price_usd_per_device_hour=ledger.note(
            "cluster.price_usd_per_device_hour", price, "default", "no price is stated: no cost", pin="cluster.price"
        ),
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        name=spec.name,
        run_id=trained_identity(chosen.shape, data, chosen.training),
        overrides=spec.overrides,
        shape=chosen.shape,
        data=data,
        training=chosen.training,
        evaluation=choose_evaluation(spec, ledger, chosen.training),
        stages=stages,
        layout=layout,
        kernels=kernels,
        cluster=cluster,
        estimates=make_estimates(chosen.workload, chosen.layouts.ranked, chosen.training, law, price, chosen.warnings),
        reasons=ledger.reasons,
    )


def _data(spec: ResolvedSpec, ledger: Ledger, tokens: int) -> Data:
    given = spec.data
    for index, source in enumerate(given.sources):
        prefix = f"data.sources[{index}]"
        ledger.note(f"{prefix}.name", source.name, "pinned", "", pin=f"{prefix}.name")
        ledger.note(f"{prefix}.path", source.path, "derived", "a connector makes the text", pin=f"{prefix}.path")
        ledger.note(f"{prefix}.connector", source.connector, "derived", "read from a path", pin=f"{prefix}.connector")
        ledger.note(f"{prefix}.weight", source.weight, "default", "in proportion to tokens", pin=f"{prefix}.weight")
    custom = "a custom, no law: as much as leaves the rest for training"
    return Data(
        root=ledger.note("data.root", given.root, "default", "where the run is started", pin="data.root"),
        sources=given.sources,
        mixture=ledger.note(
            "data.mixture",
            given.mixture,
            "derived",
            "weights are given" if given.mixture == "weighted" else "no weights are given: in proportion to tokens",
        ),
        budget_tokens=tokens,
        validation_fraction=ledger.note(
            "data.validation_fraction",
            given.validation_fraction.clip(VALIDATION_FRACTION),
            "default",
            custom,
            pin="data.validation",
        ),
        test_fraction=ledger.note(
            "data.test_fraction", given.test_fraction.clip(TEST_FRACTION), "default", custom, pin="data.test"
        ),
        tokenizer=ledger.note("data.tokenizer", "byte_bpe", "default", "spells every text, and is what Llama 3 uses"),
    )
