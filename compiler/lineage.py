"""Which stage starts from which: `from` as written, or the nearest above; and the models along the way."""

from collections.abc import Mapping

from trainwright.compiler.spec_stages import MODEL_KINDS, PROMPT_KINDS, STARTING_KINDS, VERIFIER, StageSpec

Stages = Mapping[str, StageSpec]


def kind_of(stages: Stages, name: str) -> str:
    """The kind of an instance: its own word for it, else its name."""
    return stages[name].kind or name


def is_path(origin: str) -> bool:
    """Whether a `from` names a checkpoint's folder; the names of stages hold no "/"."""
    return "/" in origin


def origin_of(stages: Stages, name: str) -> str:
    """The instance or path that a stage starts from; "" for a path, a kind that starts from none, and where nothing is above.

    Where nobody wrote it: the nearest model stage above; for an export also an evaluate stage, whose gates then count.
    """
    if name not in stages or (kind := kind_of(stages, name)) not in STARTING_KINDS:
        return ""
    written = stages[name].origin
    if written is not None:
        return written
    wanted = {*MODEL_KINDS, *(("evaluate",) if kind == "export" else ())}
    above = list(stages)[: list(stages).index(name)]
    return next((other for other in reversed(above) if kind_of(stages, other) in wanted), "")


def reward_of(stages: Stages, name: str) -> str:
    """Who scores the answers of a ppo or grpo stage: an instance, a path, or VERIFIER; "" for other kinds, and for none.

    Where nobody wrote it: of ppo the nearest reward stage above, of grpo a verifier.
    """
    if name not in stages or (kind := kind_of(stages, name)) not in PROMPT_KINDS:
        return ""
    written = stages[name].reward
    if written is not None:
        return written
    if kind == "grpo":
        return VERIFIER
    above = list(stages)[: list(stages).index(name)]
    return next((other for other in reversed(above) if kind_of(stages, other) == "reward"), "")


def stands_on(stages: Stages, name: str, other: str) -> bool:
    """Whether `name` needs the model of `other` in the end, to start from or to score by."""
    pending, seen = [name], set[str]()
    while pending:
        one = pending.pop()
        if one not in seen:
            seen.add(one)
            pending += [origin_of(stages, one), reward_of(stages, one)]
    return other in seen


def lineage_of(stages: Stages, name: str) -> tuple[str, ...]:
    """`name`, what it starts from, what that starts from, ...: to a pretrain stage or a path. It ends before a name that no
    stage has, and before one that is there already."""
    line: list[str] = []
    while name and name not in line and (name in stages or is_path(name)):
        line.append(name)
        name = origin_of(stages, name)
    return tuple(line)


def model_of(stages: Stages, name: str) -> str:
    """The model that `name` stands for: itself (a model stage, or a path), or the one that it evaluated; "" for none."""
    return next((one for one in lineage_of(stages, name) if one not in stages or _is_model(stages, one)), "")


def base_of(stages: Stages, name: str) -> str:
    """Where the model of `name` comes from in the end: a pretrain stage, or a path; "" where its line leads to neither."""
    last = (lineage_of(stages, name) or ("",))[-1]
    return last if is_path(last) or (last and kind_of(stages, last) == "pretrain") else ""


def tuned_on_the_way(stages: Stages, names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The stages of a tuning kind that the models of `names` have passed, in the order of the spec."""
    passed = {one for name in names for one in lineage_of(stages, name)}
    return tuple(name for name in stages if name in passed and kind_of(stages, name) == kind)


def _is_model(stages: Stages, name: str) -> bool:
    return kind_of(stages, name) in MODEL_KINDS
