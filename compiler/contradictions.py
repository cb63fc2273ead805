"""What a spec says twice, or in two ways: rules over several of its fields, before any fact is looked up."""

from trainwright.compiler.spec import ClusterSpec, DataSpec, LayoutSpec, Spec
from trainwright.compiler.stage_rules import find_stage_contradictions


def find_contradictions(spec: Spec) -> list[tuple[str, str]]:
    """(path, what is wrong and the fix) of every pair of fields that do not go together."""
    return [
        *_model_contradictions(spec),
        *_rate_contradictions(spec),
        *_layout_contradictions(spec.layout),
        *_data_contradictions(spec.data),
        *_cost_contradictions(spec.cluster),
        *find_stage_contradictions(spec),
    ]


def _model_contradictions(spec: Spec) -> list[tuple[str, str]]:
    found = []
    shape, budget = spec.model.shape, spec.compute.budget
    if shape is not None and spec.model.size is not None:
        found.append(("model.shape", "size and shape both say how large the model is; keep one"))
    if shape is not None and shape.head_dim is None and shape.hidden_size % shape.num_attention_heads:
        width = f"{shape.hidden_size} / {shape.num_attention_heads} = {shape.hidden_size / shape.num_attention_heads:g}"
        text = f"hidden_size / num_attention_heads = {width} is no whole width of a head; change one, or state head_dim"
        found.append(("model.shape.num_attention_heads", text))
    if shape is not None and shape.num_query_groups and shape.num_attention_heads % shape.num_query_groups:
        found.append(
            ("model.shape.num_query_groups", _uneven_groups(shape.num_attention_heads, shape.num_query_groups))
        )
    objective = spec.objective
    says = (shape, spec.model.size, spec.data.tokens, budget, objective.target_loss, objective.deadline)
    if all(pin is None for pin in says):
        text = (
            "nothing says how much to train; give model.size, model.shape, data.tokens, compute.budget or an objective"
        )
        found.append(("model", text))
    if objective.target_loss and spec.data.tokens and (shape or spec.model.size):
        text = "size and tokens are both stated, and the loss follows from them; leave one of the three out"
        found.append(("objective.target_loss", text))
    if budget is not None and budget.kind == "money" and spec.cluster.price is None:
        found.append(
            ("compute.budget", 'a budget in money needs a price; add cluster.price, such as "$2.10/device-hour"')
        )
    return found


def _layout_contradictions(layout: LayoutSpec) -> list[tuple[str, str]]:
    found = []
    for name, mode in (("recompute_modules", "selective"), ("recompute_method", "full"), ("recompute_layers", "full")):
        if getattr(layout, name) is not None and layout.recompute != mode:
            text = f"only {mode} recompute has it; add recompute: {mode}, or remove {name}"
            found.append((f"layout.{name}", text))
    if layout.fp8_recipe is not None and layout.fp8 in (None, "none"):
        found.append(("layout.fp8_recipe", "no 8-bit floats are asked for; add fp8: hybrid, or remove fp8_recipe"))
    return found


def _cost_contradictions(cluster: ClusterSpec) -> list[tuple[str, str]]:
    names = [line.name for line in cluster.costs]
    return [
        (f"cluster.costs[{index}].name", f"{name} is the name of two cost lines; rename one, or add their amounts")
        for index, name in enumerate(names)
        if name in names[:index]
    ]


def _rate_contradictions(spec: Spec) -> list[tuple[str, str]]:
    found = []
    training, scaling = spec.training, spec.scaling
    low, high = training.min_learning_rate, training.learning_rate
    if low is not None and high is not None and low > high:
        found.append(("training.min_learning_rate", f"{low:g} is above learning_rate {high:g}; lower it"))
    if training.warmup is not None and training.warmup.kind == "fraction" and training.warmup.amount > 1:
        found.append(
            ("training.warmup", f"{training.warmup.amount:.0%} of the steps is more than all of them; 100% at most")
        )
    if training.decay is not None and training.schedule != "wsd":
        written = (
            f"schedule is {training.schedule}" if training.schedule else "no schedule is written, and cosine is taken"
        )
        found.append(
            ("training.decay", f"only wsd has a decay of its own; {written}; add schedule: wsd, or remove decay")
        )
    if training.decay is not None and training.decay.kind == "fraction" and training.decay.amount > 1:
        found.append(
            ("training.decay", f"{training.decay.amount:.0%} of the steps is more than all of them; 100% at most")
        )
    if scaling.learning_rate == "mup" and scaling.mup is None:
        text = "mup transfers the rate of a base run; add scaling.mup: {hidden_size: 256, learning_rate: 6e-3, init_std: 0.02}"
        found.append(("scaling.learning_rate", text))
    if scaling.mup is not None and scaling.learning_rate != "mup":
        found.append(("scaling.mup", "the base run of learning_rate: mup; add learning_rate: mup, or remove mup"))
    return found


def _uneven_groups(heads: int, groups: int) -> str:
    divisors = [divisor for divisor in range(1, heads + 1) if heads % divisor == 0]
    near = [*[divisor for divisor in divisors if divisor < groups][-1:], *[d for d in divisors if d > groups][:1]]
    return (
        f"num_attention_heads / num_query_groups = {heads} / {groups} = {heads / groups:g} is no whole number of query heads "
        f"a group; take {' or '.join(map(str, near))}"
    )


def _data_contradictions(data: DataSpec) -> list[tuple[str, str]]:
    found = []
    for index, source in enumerate(data.sources):
        if (source.path is None) == (source.connector is None):
            both = "path and connector are both there" if source.path else "neither path nor connector is there"
            found.append((f"data.sources[{index}]", f"{both}; a source ({source.name}) has exactly one of them"))
        if source.name in [other.name for other in data.sources[:index]]:
            found.append((f"data.sources[{index}].name", f"{source.name} is the name of two sources; rename one"))
    bare = [source.name for source in data.sources if source.weight is None]
    if 0 < len(bare) < len(data.sources):
        found.append(
            (
                "data.sources",
                f"{', '.join(bare)} without a weight beside others with one; give all of them a weight, or none",
            )
        )
    return found
