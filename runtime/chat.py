"""`chat`: talk in the terminal with the latest model of a bundle, from its checkpoint. Imports no torch until one is found."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from trainwright.runtime.errors import INTERRUPTED, BundleError, DataError, MissingExtra
from trainwright.runtime.launch.bundle import Bundle, open_bundle
from trainwright.runtime.manifest import Stage
from trainwright.runtime.reading import printable
from trainwright.runtime.talk import Choice, Continuation, Speaker, Talk
from trainwright.runtime.workspace import Workspace

MODEL_KINDS = ("pretrain", "sft", "dpo")  # stages that leave a model
PROMPT = "> "


def chat_bundle(
    bundle: Path,
    *,
    stage: str,
    messages: Sequence[str],
    system: str,
    choice: Choice,
    work: Path | None = None,
) -> int:
    """Answer `messages`, one after the other, or what the user types. Returns 0, or `errors.INTERRUPTED` after Ctrl-C.

    `stage`: whose model ("": the last stage's that is done). `work`: where the run keeps its files (default: BUNDLE/work).
    Raises BundleError, CheckpointError, DataError, MissingExtra.
    """
    opened = open_bundle(bundle)
    folder = Path(os.path.realpath(work if work is not None else opened.path / "work"))
    workspace = Workspace(bundle=opened.path, work=folder, data_root=Path())  # a stage's model lies below `work`
    chosen = choose_stage(opened, workspace, stage)
    if not all(text.strip() for text in messages):
        raise DataError("a message is empty: say something after --message")
    try:
        with _spinner(f"loading {chosen.name}"):
            talk = _open(workspace, chosen.name, system, choice)
        if messages:
            _answer_all(talk, messages)
        else:
            _converse(talk)
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def choose_stage(opened: Bundle, workspace: Workspace, name: str) -> Stage:
    """The stage called `name`; else the last one, in the bundle's order, that has left its model. Raises BundleError."""
    models = [stage for stage in opened.stages if stage.kind in MODEL_KINDS]
    names = ", ".join(stage.name for stage in models) or "none"
    if name:
        for stage in models:
            if stage.name == name:
                return stage
        raise BundleError(f"stage {name!r} trains no model in this bundle; those that do: {names}")
    for stage in reversed(models):
        if workspace.stage(stage.name).summary.exists():
            return stage
    begun = [stage.name for stage in models if any(workspace.stage(stage.name).checkpoints.glob("step-*"))]
    hint = f"; {begun[-1]} has a checkpoint already: --stage {begun[-1]}" if begun else ""
    raise BundleError(
        f"no model is trained yet (stages that train one: {names}): run `trainwright run {opened.path}` first{hint}"
    )


def _open(workspace: Workspace, stage: str, system: str, choice: Choice) -> Talk | Continuation:
    """Load the stage's newest checkpoint."""
    warnings.filterwarnings("ignore")  # of Megatron-Core's imports; nobody who talks can do anything about them
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    try:
        from trainwright.runtime.megatron.checkpoint import files_of, find_model
        from trainwright.runtime.megatron.generate import open_cached
        from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "trainwright":
            raise
        raise MissingExtra(f"chat needs {package}, which is not installed: pip install 'trainwright[run]'") from error
    folder = find_model(workspace, stage)
    files = files_of(folder)
    speaker = Speaker(open_cached(folder), choice)
    words = ChatTokenizer(files.tokenizer, files.chat_template or DEFAULT_TEMPLATE)
    if files.chat_template:
        _note(f"{stage}, {folder.name}")
        return Talk(speaker, words, _note, system=system)
    if system:
        raise DataError(f"--system needs a model that was tuned on conversations, and {stage} is only pretrained")
    _note(f"{stage}, {folder.name}: a model that was only pretrained knows no turns; it continues your text")
    return Continuation(speaker, words, _note)


def _answer_all(talk: Talk | Continuation, messages: Sequence[str]) -> None:
    for text in messages:
        _print_answer(talk, text)


def _converse(talk: Talk | Continuation) -> None:
    """Until /exit, or the end of what is typed (Ctrl-D)."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        _note("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer")
    while True:
        try:
            line = input(PROMPT if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            continue
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
        elif line:
            _answer_typed(talk, line)


def _answer_typed(talk: Talk | Continuation, text: str) -> None:
    try:
        _print_answer(talk, text)
    except DataError as error:
        _note(str(error))
    except KeyboardInterrupt:
        print()


def _print_answer(talk: Talk | Continuation, text: str) -> None:
    with contextlib.closing(talk.ask(text)) as pieces:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
    print(flush=True)


def _note(text: str) -> None:
    """To stderr: stdout has the answers alone."""
    print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
