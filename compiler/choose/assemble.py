"""A chosen candidate -> Plan: every section, and a reason for each of their leaves."""

from trainwright.compiler.choose.candidate import Candidate
from trainwright.compiler.choose.cluster import choose_cluster
from trainwright.compiler.choose.costs import Pretraining, estimate_pipeline
from trainwright.compiler.choose.estimates import make_estimates
from trainwright.compiler.choose.evaluation import choose_evaluations, choose_exports
from trainwright.compiler.choose.hyperparameters import price_batch
from trainwright.compiler.choose.kernels import choose_kernels
from trainwright.compiler.choose.ledger import Ledger, Section
from trainwright.compiler.choose.programs import estimate_programs
from trainwright.compiler.choose.stages import choose_stages
from trainwright.compiler.choose.training import choose_validation
from trainwright.compiler.choose.tuning import Pretrained, choose_tunings
from trainwright.compiler.plan import SCHEMA_VERSION, Curation, Data, Plan, Round, Source, trained_identity
from trainwright.compiler.resolve import ResolvedSpec

# Held out of each source's bytes: 12 % for the final test and 4 % for validation leave 84 % for training (custom, no law).
TEST_FRACTION, VALIDATION_FRACTION = 0.12, 0.04
NEAR_DUPLICATES, PERMUTATIONS, SHINGLE_WORDS = 0.8, 128, 5
SCRUBBED = ("email", "ip", "card", "iban")


def assemble_plan(spec: ResolvedSpec, chosen: Candidate, rounds: tuple[Round, ...]) -> Plan:
    """The plan of the candidate that the loop settled on."""
    ledger, compute = chosen.ledger, spec.compute
    stages = choose_stages(spec, ledger)
    data = _data(spec, ledger, chosen.tokens)
    layout = chosen.layouts.ranked.row(0)
    for path, reason in chosen.layouts.reasons.items():
        ledger.note(path, None, reason.kind, reason.text, pin=path)
    kernels = choose_kernels(
        ledger,
        cuda=compute.device.kind == "cuda",
        layer_spec=spec.layout.layer_spec.values[0],
        fp8=spec.layout.fp8,
        fp8_recipe=spec.layout.fp8_recipe,
        fp32_gradients=chosen.workload.gradient_bytes == 4,
        precision=chosen.training.precision,
        shape=chosen.shape,
        layout=layout,
        steps=chosen.training.steps,
        step_s=chosen.layouts.step_s,
    )
    before = Pretrained(chosen.shape, data, chosen.training, layout, chosen.layouts.step_s)
    tunings = choose_tunings(spec, ledger, before, stages)
    cluster = choose_cluster(spec, ledger)
    of_devices = compute.devices * compute.device.peak_flops_per_s[chosen.training.precision]
    pretraining = Pretraining(
        chosen.workload, chosen.training, chosen.layouts.step_s, mfu=chosen.flops_per_s / of_devices
    )
    batch = price_batch(spec.scaling, chosen.shape, chosen.training)
    costs = estimate_pipeline(spec, pretraining, cluster, stages, tunings.all)
    programs = estimate_programs(chosen.workload, layout, stages, tunings)
    return Plan(
        schema_version=SCHEMA_VERSION,
        name=spec.name,
        run_id=trained_identity(chosen.shape, data, chosen.training),
        overrides=spec.overrides,
        shape=chosen.shape,
        data=data,
        training=chosen.training,
        validation=choose_validation(spec, ledger, chosen.training),
        stages=stages,
        sft=tunings.sft,
        reward=tunings.reward,
        dpo=tunings.dpo,
        ppo=tunings.ppo,
        grpo=tunings.grpo,
        evaluate=choose_evaluations(spec, ledger, stages, (*tunings.sft, *tunings.dpo)),
        export=choose_exports(ledger, stages),
        layout=layout,
        kernels=kernels,
        cluster=cluster,
        estimates=make_estimates(spec, chosen, rounds, cluster, costs, batch, programs),
        reasons=ledger.reasons,
    )


def _data(spec: ResolvedSpec, ledger: Ledger, tokens: int) -> Data:
    given = spec.data
    for index, source in enumerate(given.sources):
        prefix = f"data.sources[{index}]"
        ledger.note(f"{prefix}.name", source.name, "pinned", "", pin=f"{prefix}.name")
        ledger.note(f"{prefix}.path", source.path, "derived", "a connector makes the text", pin=f"{prefix}.path")
        ledger.note(f"{prefix}.connector", source.connector, "derived", "read from a path", pin=f"{prefix}.connector")
        ledger.note(f"{prefix}.filters", source.filters, "default", _why_filters(source), pin=f"{prefix}.filters")
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
        curation=_curation(spec, ledger),
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
        tokenizer=ledger.note(
            "data.tokenizer", "initial", "derived", "weights mean something to their own token ids alone"
        )
        if spec.model.initial
        else ledger.note("data.tokenizer", "byte_bpe", "default", "spells every text, and is what Llama 3 uses"),
    )


def _why_filters(source: Source) -> str:
    return (
        f"the connector makes {source.filters}" if source.connector else "files hold prose, unless the source says code"
    )


def _curation(spec: ResolvedSpec, ledger: Ledger) -> Curation:
    given = spec.stages.curation
    name = next((stage.name for stage in spec.stages.written if stage.kind == "curate"), "curate")
    note = Section(ledger, "data.curation", f"stages.{name}").note
    scrub = given.scrub[0] if given.scrub else SCRUBBED
    for index in range(len(scrub)):
        note(
            f"scrub[{index}]",
            None,
            "default",
            "a pattern, and a check digit where there is one, finds it: few false alarms",
        )
    if not scrub:
        note("scrub", None, "pinned", f"stages.{name}.scrub is empty in the spec")
    error = (NEAR_DUPLICATES * (1 - NEAR_DUPLICATES) / PERMUTATIONS) ** 0.5
    return Curation(
        exact_duplicates=note(
            "exact_duplicates",
            True,
            "default",
            "repeated texts are learned by heart (Lee et al. 2022, arXiv 2107.06499)",
        ),
        near_duplicates=note(
            "near_duplicates",
            given.near_duplicates.clip(NEAR_DUPLICATES),
            "default",
            "Gopher's MassiveText (arXiv 2112.11446) and SlimPajama: Jaccard similarity 0.8",
        ),
        permutations=note(
            "permutations",
            PERMUTATIONS,
            "default",
            f"a MinHash estimate of {NEAR_DUPLICATES:g} is then off by {error:.2g} (one standard error)",
        ),
        shingle_words=note(
            "shingle_words", SHINGLE_WORDS, "default", "FineWeb (arXiv 2406.17557) and Lee et al. 2022 compare 5-grams"
        ),
        scrub=scrub,
    )
