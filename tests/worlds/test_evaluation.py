"""Evaluation with real parts: two saved models, held-out data of every kind, lm-evaluation-harness; in several layouts."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from world_support import Case, literals, run_world

from trainwright.runtime.errors import CheckpointError, DataError, Diverged, GateFailed, RunError, Unsupported
from trainwright.runtime.megatron import loop, model, parallel
from trainwright.runtime.megatron.checkpoint import Checkpoints, Identity, ModelFiles, load_weights
from trainwright.runtime.megatron.data import TokenFile
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.stages import evaluate
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer
from trainwright.runtime.stages.crew import Crew
from trainwright.runtime.stages.heldout import HeldOutText, score
from trainwright.runtime.stages.preparation import Preparation
from trainwright.runtime.stages.records import Message
from trainwright.runtime.stages.token_files import tokenizer_id
from trainwright.runtime.stages.tokenizer import train as train_tokenizer
from trainwright.runtime.workspace import DATA_ROOT_VARIABLE, Workspace, write_json

VOCABULARY, SEQUENCE = 280, 96
QUESTIONS = [
    {
        "query": f"What is {n} plus {n + 3}?",
        "choices": [f"It is {2 * n + 3}.", f"Blue {n}!", f"{n}", "Wer weiß?"],
        "answer": n % 4,
        "id": f"q{n}",
    }
    for n in range(12)
]
PAIRS = [
    {
        "prompt": f"Say {n}!",
        "chosen": f"{n}, as you wish.",
        "rejected": ("{}, as you", "No.", "No, {} is what nobody says, least of all today.")[n % 3].format(n),
        "kind": "other" if n % 3 else "truncated",
        "id": f"p{n}",
        "group": "held out",
    }
    for n in range(9)
]
TALKS = [
    {
        "messages": [{"role": "user", "content": f"Say {n}!"}, {"role": "assistant", "content": f"{n}, as you wish."}],
        "group": "held out" if n < 9 else "seen",
    }
    for n in range(12)
]
TASK = evaluate.Task(name="sums", path="questions.jsonl", connector="", num_fewshot=0)
SETTINGS: dict[str, Any] = {
    "perplexity": evaluate.Perplexity(inputs="tokenize", sources=("code", "prose"), baseline="bigram"),
    "conversations": (evaluate.Records(name="sft", path="talks.jsonl", connector="", too_long="truncate"),),
    "preferences": (evaluate.Records(name="dpo", path="pairs.jsonl", connector="", too_long="truncate"),),
    "tasks": (TASK,),
    "gates": (),
}


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def embedding_of(case: Case) -> model.Embedding:
    _, embedding = literals(case)
    return dataclasses.replace(embedding, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, sequence_length=SEQUENCE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Tokenised text, records, and the untrained models `sft` (with a template) and `pretrain` (without)."""
    folder = tmp_path_factory.mktemp("evaluation")
    place = Workspace(bundle=folder, work=folder / "work", data_root=folder)
    tokenizer_json = folder / "tokenizer.json"
    texts = [str(question["query"]) for question in QUESTIONS]
    train_tokenizer(iter(texts), VOCABULARY).save(str(tokenizer_json))
    write_lines(folder / "questions.jsonl", QUESTIONS)
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "talks.jsonl", TALKS)
    write_json(folder / "split.json", {"seed": 1, "validation": 0.0, "test": 0.0, "groups": {"held out": "test"}})
    counts = {"code": 5 * SEQUENCE + 7, "prose": SEQUENCE}
    generator = torch.Generator().manual_seed(3)
    tokens = place.stage("tokenize").output
    for split in ("train", "validation", "test"):
        (tokens / split).mkdir(parents=True)
        for source, count in counts.items():
            file = TokenFile(tokens / split / source, VOCABULARY)
            file.add_document(torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())
            file.finish()
    summary = {
        "tokens": dict.fromkeys(("train", "validation", "test"), counts),
        "bytes": {"test": {source: 3 * count for source, count in counts.items()}},
        "vocab_size": VOCABULARY,
        "end_of_text": 0,
        "token_dtype": "uint16",
        "tokenizer": tokenizer_id(tokenizer_json),
    }
    write_json(place.stage("tokenize").summary, summary)

    def save() -> None:
        for name, template, seed in (("pretrain", "", 1), ("sft", DEFAULT_TEMPLATE, 2)):
            here = parallel.start(Case().layout, seed)
            used, _ = here.adapt(
                literals(Case(distributed_optimizer=False))[0]
            )  # it may be saved before its first step
            files = ModelFiles(tokenizer_json, folder / "split.json", template)
            checkpoints = Checkpoints(
                place.stage(name).checkpoints, Identity("run", "inputs"), keep_last=1, log=print, files=files
            )
            checkpoints.save(model.build(used, embedding_of(Case()), here), 7)
            parallel.stop()

    run_world(1, save)
    return place


def run_stage(place: Workspace, case: Case, stage: str = "evaluate", **changed: Any) -> list[RunError | None]:
    """Run the stage in a world of `case`: what each rank raised."""

    def work() -> RunError | None:
        evaluate.dist.destroy_process_group = lambda: None  # the world's, which ends it
        sys.argv[0] = str(place.bundle / "program.py")
        os.environ[DATA_ROOT_VARIABLE] = str(place.data_root)
        settings = {"initial": "sft", "compare": ("pretrain",), **SETTINGS, **changed}
        try:
            evaluate.run.__wrapped__(  # type: ignore[attr-defined]  # without what turns errors into exit codes
                stage=stage,
                seed=1,
                parallel=case.layout,
                model=literals(case)[0].model,
                embedding=embedding_of(case),
                layer_spec="local",
                micro_batch=2,
                **settings,
            )
        except RunError as error:
            return error
        return None

    return run_world(case.layout.world_size, work)


def read(place: Workspace, stage: str = "evaluate", file: str = "results.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.stage(stage).output / file).read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def results(place: Workspace) -> dict[str, Any]:
    assert run_stage(place, Case()) == [None]
    return read(place)


@pytest.fixture(scope="module")
def expected(place: Workspace) -> dict[str, Any]:
    """By hand, of the model `sft`: log-probabilities from whole passes over single sequences; figures on the text."""

    def work() -> dict[str, Any]:
        here = parallel.start(Case().layout, 1)
        used, _ = here.adapt(literals(Case())[0])
        built = model.build_frozen(used, embedding_of(Case()), here)
        load_weights(built, place.stage("sft").checkpoints / "step-000007")
        chat = ChatTokenizer(place.bundle / "tokenizer.json", DEFAULT_TEMPLATE)

        def answer(prompt: str, text: str, *, ends: bool) -> float:
            begin = chat.prompt([Message("user", prompt)])
            tokens = begin + chat.encode_text(text) + ([chat.end_of_turn] if ends else [])
            logs = loop.forward_logits(built, torch.tensor(tokens[:-1])).log_softmax(-1)
            return sum(float(logs[at - 1, tokens[at]]) for at in range(len(begin), len(tokens)))

        ticks: list[int] = []
        crew = Crew(built, 2 * SEQUENCE, ticks.append)
        likeliest = [5]
        for _ in range(3):
            logits = loop.forward_logits(built, torch.tensor(likeliest))
            likeliest.append(int(logits[-1].argmax()))
        two = [Tokens((*likeliest[:-1], last), (0, 1, 1, 1)) for last in (likeliest[-1], likeliest[-1] - 1)]
        plain, greedy = crew.ask([*two, *two]), crew.ask(two, greedy=True)
        text = place.stage("tokenize")
        held = HeldOutText(text.output, json.loads(text.summary.read_text()), ("code", "prose"))
        windows = held.windows("test", SEQUENCE)
        figures = {
            "choices": [[answer(q["query"], choice, ends=False) for choice in q["choices"]] for q in QUESTIONS],
            "chosen": [answer(pair["prompt"], pair["chosen"], ends=True) for pair in PAIRS],
            "rejected": [answer(pair["prompt"], pair["rejected"], ends=True) for pair in PAIRS],
            "text": held.test(built, micro_batch=2, baseline="bigram"),
            "code": score(built, windows["code"], range(windows["code"].num_windows), 2),
            "greedy": [score.is_greedy for score in greedy],
            "same": [
                first.log_probability - second.log_probability for first, second in zip(greedy, plain[2:], strict=True)
            ],
            "ticks": sum(ticks),
            "answer tokens": [len(chat.encode_text(pair["chosen"])) + 1 for pair in PAIRS],
        }
        with torch.no_grad():
            next(built.gpt.parameters()).fill_(math.nan)
        with pytest.raises(Diverged, match="no numbers"):
            crew.ask(two, greedy=True)
        return figures

    found: dict[str, Any] = run_world(1, work)[0]
    return found


def items_of(place: Workspace, metric: str) -> list[dict[str, Any]]:
    lines = (place.stage("evaluate").output / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["metric"] == metric]


def test_choices_score_what_single_passes_give(
    place: Workspace, results: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Length-normalised: by characters, as lm-eval's acc_norm."""
    right, right_norm = [], []
    for question, scores in zip(QUESTIONS, expected["choices"], strict=True):
        choices, answer = question["choices"], question["answer"]
        assert isinstance(choices, list)
        by_character = [value / len(text) for value, text in zip(scores, choices, strict=True)]
        right.append(float(scores.index(max(scores)) == answer))
        right_norm.append(float(by_character.index(max(by_character)) == answer))
    assert right_norm != right, "the test could not tell them apart"
    assert [row["scores"]["sft"] for row in items_of(place, "accuracy/sums")] == right_norm
    assert [row["scores"]["sft"] for row in items_of(place, "accuracy_unnormalised/sums")] == right
    assert results["metrics"]["sft"]["accuracy/sums"]["value"] == pytest.approx(sum(right_norm) / 12)
    assert results["about"]["accuracy/sums"] == {"items": "questions", "interval": "Wilson", "chance": 0.25}


def test_pairs_and_conversations_score_what_single_passes_give(
    results: dict[str, Any], expected: dict[str, Any]
) -> None:
    measured = results["metrics"]["sft"]
    chosen, rejected = expected["chosen"], expected["rejected"]
    prefers = [first > second for first, second in zip(chosen, rejected, strict=True)]
    assert 0 < sum(prefers) < 9, "the test could not tell them apart"
    assert measured["preference_accuracy/dpo"]["value"] == pytest.approx(sum(prefers) / 9)
    truncated = [won for won, pair in zip(prefers, PAIRS, strict=True) if pair["kind"] == "truncated"]
    assert measured["preference_accuracy/dpo/truncated"]["value"] == pytest.approx(sum(truncated) / 3)
    assert measured["preference_accuracy/dpo/truncated"]["n"] == 3
    assert measured["chosen_log_probability/dpo"]["value"] == pytest.approx(sum(chosen) / 9, rel=1e-5)
    assert measured["loss/sft"]["value"] == pytest.approx(-sum(chosen) / sum(expected["answer tokens"]), rel=1e-5)
    assert results["counts"]["preferences/dpo"]["measured"] == 9
    assert results["counts"]["conversations/sft"]["in"] == 12, "three of them are not held out"
    assert measured["loss/sft"]["n"] == 9


def test_what_is_asked_twice_is_scored_once_but_for_whether_it_is_greedy(expected: dict[str, Any]) -> None:
    assert expected["greedy"] == [True, False]
    assert expected["same"] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert expected["ticks"] == 4 + 2, "progress counts what is asked"


def test_text_has_the_perplexity_that_pretraining_measures(results: dict[str, Any], expected: dict[str, Any]) -> None:
    measured, by_training = results["metrics"]["sft"], expected["text"]
    for name in ("perplexity", "bits_per_byte"):
        assert measured[name]["value"] == pytest.approx(by_training[f"test/{name}"], rel=1e-5)
        assert results["baselines"]["bigram"][name] == pytest.approx(by_training[f"bigram/{name}"])
    nats, tokens = expected["code"]
    assert measured["perplexity/code"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert results["baselines"]["bigram"]["perplexity/code"] == pytest.approx(math.exp(by_training["bigram/loss/code"]))
    assert measured["perplexity"]["n"] == 7
    assert measured["perplexity"]["low"] < measured["perplexity"]["value"] < measured["perplexity"]["high"]


def test_models_are_compared_on_the_same_items(place: Workspace, results: dict[str, Any]) -> None:
    for name, difference in results["differences"]["pretrain"].items():
        first, second = (results["metrics"][model_name][name]["value"] for model_name in ("sft", "pretrain"))
        assert difference["value"] == pytest.approx(first - second, abs=1e-9)
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert results["metrics"]["sft"]["perplexity"]["value"] != results["metrics"]["pretrain"]["perplexity"]["value"]
    assert results["checkpoints"] == {"sft": "step-000007", "pretrain": "step-000007"}
    assert [row["id"] for row in items_of(place, "accuracy/sums")] == [question["id"] for question in QUESTIONS]
    nats = [row["scores"]["sft"] for row in items_of(place, "perplexity/code")]
    assert math.log(results["metrics"]["sft"]["perplexity/code"]["value"]) == pytest.approx(
        (SEQUENCE * sum(nats[:5]) + 6 * nats[5]) / (5 * SEQUENCE + 6), abs=1e-5
    )
    assert [row["id"] for row in items_of(place, "perplexity/code")] == [f"code:{number}" for number in range(6)]
    assert read(place, file="summary.json")["key_figure"].startswith("accuracy/sums ")


@pytest.mark.parametrize("case", [Case(data=2), Case(tensor=2), Case(pipeline=2)], ids=str)
def test_every_layout_gives_the_same_figures(place: Workspace, results: dict[str, Any], case: Case) -> None:
    stage = f"evaluate-{case.tensor}-{case.pipeline}"
    assert run_stage(place, case, stage) == [None, None]
    found = read(place, stage)
    for name in ("sft", "pretrain"):
        for metric, figure in results["metrics"][name].items():
            for key, value in figure.items():
                assert found["metrics"][name][metric][key] == pytest.approx(value, rel=1e-4), (metric, key)


def test_a_missed_gate_leaves_every_figure_and_no_summary(place: Workspace, results: dict[str, Any]) -> None:
    write_json(place.stage("gated").summary, {"key_figure": "of an earlier attempt"})
    gates = (evaluate.Gate("perplexity", 2.0), evaluate.Gate("accuracy/sums", 0.0))
    [error, other] = run_stage(place, Case(data=2), "gated", gates=gates, compare=(), perplexity=SETTINGS["perplexity"])
    assert isinstance(error, GateFailed)
    assert other is None, "one rank says it"
    value = results["metrics"]["sft"]["perplexity"]["value"]
    assert str(error).startswith(f"gate perplexity: {value:,.1f} [")
    assert f"is above 2 by {value - 2:,.1f} (95 % interval excludes the threshold); " in str(error)
    assert str(error).endswith("work/gated/output/results.json has all figures")
    assert not place.stage("gated").summary.exists()
    written = read(place, "gated")
    assert [gate["passed"] for gate in written["gates"]] == [False, True]
    assert written["gates"][0]["margin"] == pytest.approx(2 - value, rel=1e-5)


def test_mistakes_are_found_before_a_model_is_loaded_and_said_by_every_rank(place: Workspace, tmp_path: Path) -> None:
    """A checkpoint without weights would be noticed by loading it."""
    step = place.stage("torn").checkpoints / "step-000001"
    step.mkdir(parents=True)
    for name in ("model.json", "tokenizer.json", "split.json", "run.json", "metadata.json"):
        (step / name).write_bytes((place.stage("sft").checkpoints / "step-000007" / name).read_bytes())
    errors = run_stage(place, Case(data=2), "wrong", initial="torn", compare=(), gates=(evaluate.Gate("taste", 1.0),))
    assert [type(error) for error in errors] == [DataError, DataError]
    assert "gate taste: this evaluation has no such metric; it measures accuracy/sums, accuracy_unnorm" in str(
        errors[0]
    )
    [error] = run_stage(place, Case(), "wrong", initial="torn", compare=())
    assert isinstance(error, CheckpointError)
    [error] = run_stage(place, Case(tied=True), "wrong")
    assert isinstance(error, CheckpointError)
    assert "tied: False there, True here" in str(error)


# ---- what is read before there is a model ----


def prepare(place: Workspace, models: Sequence[str] = ("sft",), **changed: Any) -> Preparation:
    preparation = Preparation(place, place.stage("prepared"), models, SEQUENCE, seed=1)
    settings = {"perplexity": None, "conversations": (), "preferences": (), "tasks": (), **changed}
    preparation.read(**settings)
    return preparation


def task(path: str, num_fewshot: int = 0) -> evaluate.Task:
    return evaluate.Task(name="mine", path=path, connector="", num_fewshot=num_fewshot)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "options": ["a", "b"], "label": 0}, ["question, options, label", '"query": "..."']),
        ({"query": "?", "choices": ["a", "b"], "answer": 2}, ["answer out of range"]),
        ({"query": "?", "choices": "ab", "answer": 0}, ['"choices" is not a list of texts']),
    ],
)
@pytest.mark.parametrize("others", [0, 3])
def test_wrong_fields_are_said_with_file_and_line(
    place: Workspace, row: dict[str, Any], words: list[str], others: int
) -> None:
    write_lines(place.data_root / "wrong.jsonl", [*QUESTIONS[:others], row])
    with pytest.raises(DataError) as raised:
        prepare(place, tasks=(task("wrong.jsonl"),))
    for word in (f"task mine: wrong.jsonl, line {others + 1}:", *words):
        assert word in str(raised.value)


def yaml_task(place: Workspace, **changed: str) -> evaluate.Task:
    settings = {
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": "{data_files: {test: questions.jsonl}}",
        "test_split": "test",
        "doc_to_text": '"Q: {{query}}\\nA:"',
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        **changed,
    }
    (place.data_root / "mine.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return task("mine.yaml")


def test_a_yaml_task_of_lm_eval_is_asked_on_local_data(place: Workspace) -> None:
    measure = prepare(place, models=("pretrain",), tasks=(yaml_task(place),)).measures["tasks/mine"]
    asked: list[Tokens] = []

    def ask(sequences: Sequence[Tokens], *, greedy: bool = False) -> list[loop.Score]:
        asked.extend(sequences)
        return [loop.Score(-float(sum(one.counts)), sum(one.counts), greedy) for one in sequences]

    values = measure.values(ask)
    chat = ChatTokenizer(place.bundle / "tokenizer.json", DEFAULT_TEMPLATE)
    assert len(asked) == measure.num_sequences == 48
    assert chat.decode(asked[0].tokens) == "Q: What is 0 plus 3?\nA: It is 3.", "a model without a template gets none"
    counted = [token for token, counts in zip(asked[0].tokens, asked[0].counts, strict=True) if counts]
    assert chat.decode(counted) == " It is 3."
    assert len(values["accuracy/mine"]) == 12


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"doc_to_text": "'{{question}}'"},
            ["'question' is undefined", "its fields are test: query, choices, answer, id"],
        ),
        ({"doc_to_target": "id"}, ["item 0: doc_to_target 'id' gives 'q0', not a number from 0 to 3"]),
        ({"doc_to_choice": "'{{query}}'"}, ["its fields are test: query"]),
        ({"output_type": "generate_until"}, ["output_type: generate_until", "multiple_choice"]),
        ({"dataset_path": "cais/mmlu"}, ["dataset_path: cais/mmlu", "local data"]),
        ({"dataset_kwargs": "{data_files: {test: gone.jsonl}}"}, ["gone.jsonl"]),
        ({"output_type": "[multiple"}, ["mine.yaml cannot be read"]),
    ],
)
def test_a_yaml_task_that_does_not_fit_its_data_says_why(
    place: Workspace, changed: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DataError) as raised:
        prepare(place, tasks=(yaml_task(place, **changed),))
    for word in ("task mine: ", "mine.yaml", *words):
        assert word in str(raised.value)


def test_examples_are_shown_as_earlier_turns(place: Workspace) -> None:
    measure = prepare(place, tasks=(task("questions.jsonl", num_fewshot=2),)).measures["tasks/mine"]
    asked: list[Tokens] = []

    def ask(sequences: Sequence[Tokens], *, greedy: bool = False) -> list[loop.Score]:
        asked.extend(sequences)
        return [loop.Score(0.0, 1, False) for _ in sequences]

    measure.values(ask)
    assert measure.counts["answers whose question was cut"] > 0
    assert max(len(one.tokens) for one in asked) == SEQUENCE + 1
    assert all(any(one.counts) and not one.counts[0] for one in asked)
    with pytest.raises(DataError, match="num_fewshot 12, and there are 11 other questions"):
        prepare(place, tasks=(task("questions.jsonl", num_fewshot=12),))


def test_models_with_other_tokenizers_are_not_compared(place: Workspace) -> None:
    step = place.stage("foreign").checkpoints / "step-000001"
    step.mkdir(parents=True)
    for name in ("model.json", "run.json", "metadata.json"):
        (step / name).write_bytes((place.stage("sft").checkpoints / "step-000007" / name).read_bytes())
    train_tokenizer(iter(["anders"]), VOCABULARY).save(str(step / "tokenizer.json"))
    with pytest.raises(DataError, match="sft and foreign have different tokenizers"):
        prepare(place, models=("sft", "foreign"))


def test_records_none_of_which_are_held_out_do_not_cost_the_evaluation(
    place: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(place.data_root / "few.jsonl", [{**talk, "group": "seen"} for talk in TALKS[:3]])
    few = evaluate.Records(name="few", path="few.jsonl", connector="", too_long="truncate")
    assert list(prepare(place, conversations=(few,), tasks=(TASK,)).measures) == ["tasks/sums"]
    assert "not measured: conversations few: no held-out item" in capsys.readouterr().out


def test_an_evaluation_of_nothing_says_so(place: Workspace) -> None:
    with pytest.raises(DataError, match="measures nothing"):
        prepare(place)


def test_a_pair_of_equal_answers_prefers_neither(place: Workspace) -> None:
    measure = prepare(place, preferences=SETTINGS["preferences"]).measures["preferences/dpo"]
    values = measure.values(lambda sequences, greedy=False: [loop.Score(-1.0, 1, False) for _ in sequences])
    assert values["preference_accuracy/dpo"].sum() == 0
    assert set(values) == {metric.name for metric in measure.metrics}


def test_the_border_between_a_question_and_its_answer(place: Workspace) -> None:
    """After a chat template's line feed the answer begins; else white space is the answer's, as lm-eval has it."""
    from lm_eval.api.instance import Instance

    from trainwright.runtime.stages.harness import HarnessModel

    chat = ChatTokenizer(place.bundle / "tokenizer.json", DEFAULT_TEMPLATE)
    asked: list[Tokens] = []

    def ask(sequences: Sequence[Tokens], *, greedy: bool = False) -> list[loop.Score]:
        asked.extend(sequences)
        return [loop.Score(0.0, 1, False) for _ in sequences]

    harness = HarnessModel(ask, chat, limit=SEQUENCE + 1)
    prompt = harness.apply_chat_template([{"role": "user", "content": "What is 1 plus 4?"}])
    pairs = [(prompt, "It is 5."), ("What is", " plus"), ("What is ", "plus"), ("", "plus")]
    harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    counted = [
        chat.decode([token for token, counts in zip(one.tokens, one.counts, strict=True) if counts]) for one in asked
    ]
    assert counted == ["It is 5.", " plus", " plus", "plus"]
    assert list(asked[0].tokens) == chat.prompt([Message("user", "What is 1 plus 4?")]) + chat.encode_text("It is 5.")
    assert asked[3].tokens[0] == chat.end_of_text


def test_a_whole_text_is_predicted_token_by_token(place: Workspace) -> None:
    """lm-eval's rolling log-likelihood; and what cannot be asked says what can."""
    from lm_eval.api.instance import Instance

    from trainwright.runtime.stages.harness import HarnessModel

    asked: list[Tokens] = []

    def ask(sequences: Sequence[Tokens], *, greedy: bool = False) -> list[loop.Score]:
        asked.extend(sequences)
        return [loop.Score(-float(sum(one.counts)), sum(one.counts), False) for one in sequences]

    chat = ChatTokenizer(place.bundle / "tokenizer.json", DEFAULT_TEMPLATE)
    harness = HarnessModel(ask, chat, limit=20)
    texts = ["What is 1 plus 4? " * 9, "", "plus"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert harness.loglikelihood_rolling(requests) == [-float(len(chat.encode_text(text))) for text in texts]
    assert max(len(one.tokens) for one in asked) == 20
    assert asked[0].tokens[0] == chat.end_of_text
    with pytest.raises(Unsupported, match="multiple_choice work"):
        harness.generate_until(requests)


def test_a_compared_model_of_another_split_is_warned_of(place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    step = place.stage("elsewhere").checkpoints / "step-000001"
    step.mkdir(parents=True)
    for name in ("model.json", "tokenizer.json", "split.json", "run.json", "metadata.json"):
        (step / name).write_bytes((place.stage("sft").checkpoints / "step-000007" / name).read_bytes())
    prepare(place, models=("sft", "elsewhere", "pretrain"), conversations=SETTINGS["conversations"])
    assert "warning" not in capsys.readouterr().out
    write_json(step / "split.json", {"seed": 2, "validation": 0.0, "test": 1.0, "groups": {}})
    prepare(place, models=("sft", "elsewhere", "pretrain"), conversations=SETTINGS["conversations"])
    said = capsys.readouterr().out
    assert said.startswith("warning: elsewhere was trained by another split of the data than sft")
    assert said.count("warning") == 1


def test_a_conversation_that_was_split_is_one_item(place: Workspace) -> None:
    turns = [
        {"role": role, "content": f"{role} says {number}"} for number in range(9) for role in ("user", "assistant")
    ]
    write_lines(place.data_root / "long.jsonl", [{"messages": turns, "id": "long", "group": "held out"}, TALKS[0]])
    records = evaluate.Records(name="long", path="long.jsonl", connector="", too_long="split")
    measure = prepare(place, conversations=(records,)).measures["conversations/long"]
    [metric] = measure.metrics
    assert [len(metric.ids), metric.ids[0]] == [2, "long"], measure.counts
    assert measure.num_sequences > 3

    def ask(sequences: Sequence[Tokens], *, greedy: bool = False) -> list[loop.Score]:
        return [loop.Score(-2.0 * sum(one.counts), sum(one.counts), False) for one in sequences]

    values = measure.values(ask)["loss/long"]
    assert (values == 2 * metric.items.weights).all()
    assert metric.figure(values, 1).n == 2
