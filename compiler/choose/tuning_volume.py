"""How much the tuning stages have to do: as stated, as measured of a connector, or assumed from published recipes."""

from trainwright.compiler.choose.ledger import Section
from trainwright.compiler.choose.tuning_batch import Batching
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.facts import Cited, find_connector_volume
from trainwright.compiler.plan_stages import Volume

PARTS = ("examples", "prompt_tokens", "answer_tokens")


def choose_volume(one: Batching, section: Section, samples: int = 0, longest_answer: int = 0) -> Volume:
    """The volume of a stage. A mean example with one of its answers is at most a context, and a generated answer at most
    `longest_answer` (0: none is generated).

    Raises IllegalPlanError where stated lengths exceed these.
    """
    given, context = one.given, one.training.context_length
    usual, kind = _usual(one)
    longest = longest_answer or context
    prompt = int(given.prompt_tokens.clip(usual["prompt_tokens"].value))
    answer = int(given.answer_tokens.clip(min(usual["answer_tokens"].value, longest)))
    bound, cut = given.too_long.pick("truncate") != "split", ""
    if bound and prompt + answer > context:
        cut = f"; a context of {context:,} tokens holds no more"
        if not given.prompt_tokens.pinned:
            prompt = max(1, context - answer if given.answer_tokens.pinned else prompt * context // (prompt + answer))
        if not given.answer_tokens.pinned:
            answer = max(1, context - prompt)
    if answer > longest:
        text = f"{answer:,} tokens a mean answer, but its generation stops at max_answer_tokens {longest:,}; lower one"
        raise one.refuse("answer_tokens", text)
    if bound and prompt + answer > context:
        raise _too_long(one, prompt, answer)
    for part in PARTS:
        suffix = "" if part == "examples" else cut
        section.note(f"volume.{part}", None, kind, usual[part].source + suffix, key=part)
    generated = "the samples of the stage: global_batch / prompts"
    text = generated if samples else f"a stage of kind {one.kind} generates no answers"
    section.note("volume.samples", None, "derived", text, key="samples")
    return Volume(int(given.examples.clip(usual["examples"].value)), prompt, answer, samples)


def _usual(one: Batching) -> tuple[dict[str, Cited], str]:
    """What is taken where the spec states nothing, and the kind of reason that it is."""
    if one.given.connector:
        measured = find_connector_volume(one.given.connector)
        return {part: Cited(getattr(measured, part), measured.source) for part in PARTS}, "fact"
    numbers = one.recipe.numbers
    text = "assumed, for no data is opened while a plan is made: "
    return {part: Cited(numbers[part].value, text + numbers[part].source) for part in PARTS}, "default"


def _too_long(one: Batching, prompt: int, answer: int) -> IllegalPlanError:
    key = "prompt_tokens" if one.given.prompt_tokens.pinned else "answer_tokens"
    return one.refuse(
        key,
        f"prompt_tokens {prompt:,} + answer_tokens {answer:,} = {prompt + answer:,} tokens a mean example, but a context has"
        f" {one.training.context_length:,}; correct them, or raise model.context_length",
    )
