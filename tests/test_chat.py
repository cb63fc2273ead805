"""`chat` as a user meets it, in a script and in a terminal, with a model that knows its conversations by heart."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from trainwright.runtime.stages.tokenizer import train
from trainwright.runtime.talk import TextStream

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
RED, GREEN = "rot \N{ROSE}", "grün \N{HERB}"
RED_AGAIN, GREEN_AGAIN = "rot, wie gesagt", "grün, wie gesagt"

# What lies below the terminal, in one process.
PROGRAM = """
import itertools, json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron.checkpoint import files_of, find_model
from trainwright.runtime.megatron.generate import open_cached
from trainwright.runtime.stages.chat import ChatTokenizer
from trainwright.runtime.talk import Choice, Speaker, Talk
from trainwright.runtime.workspace import Workspace

folder = Path(sys.argv[1])
checkpoint = find_model(Workspace(folder, folder / "work", folder), "sft")
files = files_of(checkpoint)
words = ChatTokenizer(files.tokenizer, files.chat_template)
model = open_cached(checkpoint)
read = []  # tokens of each pass
model._model.gpt.embedding.register_forward_hook(lambda module, args, out: read.append(len(out)))
notes = []

def talk(temperature=0.0, max_tokens=40, seed=0, **more):
    choice = Choice(temperature=temperature, top_k=0, max_tokens=max_tokens, seed=seed)
    return Talk(Speaker(model, choice), words, notes.append, **more)

def asked(which, *texts):
    return ["".join(which.ask(text)) for text in texts]

result = {}
ours = talk()
pieces = list(ours.ask("red"))
read.clear()
result["again"], result["passes"] = asked(ours, "again"), list(read)
result["pieces"] = pieces
result["forgetful"], result["notes"] = asked(ours, "green", "again"), list(notes)
try:
    asked(ours, "word " * 60)
except DataError as error:
    result["too_long"] = str(error)
result["after_too_long"] = [message.content for message in ours._turns]
ours.reset()
result["after_reset"] = asked(ours, "again")

stopped = talk()
answer = stopped.ask("red")
taken = "".join(itertools.islice(answer, 1))
answer.close()
result["taken"], result["kept"] = taken, [message.content for message in stopped._turns]

result["drawn"] = [asked(talk(temperature=3.0, seed=seed), "red", "again") for seed in (1, 1, 2)]
result["cut"] = ["".join(talk(max_tokens=n).ask("red")) for n in (1, 2)]
endless = Speaker(model, Choice(temperature=1.0, top_k=0, max_tokens=500, seed=0))
result["longest"] = len(list(endless.answer(words.encode_text("red " * 9), ends=())))
result["given"] = len(words.encode_text("red " * 9))
result["context"] = model.max_tokens
read.clear()
asked(talk(system="You name colours."), "red")
result["system"] = read[0]
print("RESULT" + json.dumps(result))
"""


def chat(*arguments: str, stdin: str = "", code: int = 0, prelude: str = "") -> tuple[str, str]:
    """(stdout, stderr) of `trainwright chat`."""
    program = f"{prelude}\nimport sys\nfrom trainwright.compiler.cli import main\nsys.argv[0] = 'trainwright'\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def result(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("chat") / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program, saved_models], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    return loaded


@pytest.fixture(scope="module")
def nothing_trained(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty work folder."""
    return str(tmp_path_factory.mktemp("work"))


def test_answers_in_a_script(saved_models: Path) -> None:
    """Each message is a turn; stdout has the answers alone."""
    out, err = chat(
        str(saved_models), "--temperature", "0", "--max-tokens", "40", "--message", "red", "--message", "again"
    )
    assert out.splitlines() == [RED, RED_AGAIN]
    assert err.splitlines() == ["sft, step-000120"]


def test_turns_from_a_pipe_where_no_compiler_is(saved_models: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainwright.runtime", "chat", saved_models, "--temperature", "0", "--max-tokens", "40"],
        input="green\n\nagain\n/reset\nagain\n/exit\nred\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, [GREEN, GREEN_AGAIN, RED_AGAIN]), done.stderr


def test_a_model_without_template_continues_text(saved_models: Path) -> None:
    """An untrained one may write anything, also what would steer a terminal."""
    out, err = chat(
        str(saved_models), "--stage", "pretrain", "--message", "red" * 99, "--max-tokens", "30", "--top-k", "0"
    )
    assert len(out) > 2
    assert all(character.isprintable() or character in "\n\t" for character in out)
    assert "only pretrained" in err
    assert "the model reads the last 66" in err


def test_in_a_terminal(saved_models: Path) -> None:
    """Ctrl-C ends an answer or a line that is being typed, not the session; Ctrl-D ends the session."""
    terminal = Terminal(TRAINWRIGHT, "chat", saved_models, "--stage", "pretrain", "--max-tokens", "48")
    terminal.expect("/reset")
    terminal.expect("> ")
    terminal.type("hello\r")
    terminal.expect("hello")
    terminal.type("\x03")
    terminal.expect("\n> ")
    terminal.type("half a line")
    terminal.expect("half a line")
    terminal.expect("\n> ", typing="\x03")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen
    assert "loading pretrain" in terminal.seen


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        ([], 20, ["no model is trained yet (stages that train one: pretrain, sft, dpo)", "run `trainwright run "]),
        (["--stage", "export"], 20, ["stage 'export' trains no model", "pretrain, sft, dpo"]),
        (["--stage", "sft", "--message", " "], 21, ["a message is empty"]),
        (["--temperature", "nan"], 2, ["--temperature"]),
    ],
    ids=["nothing trained", "no such model", "no message", "no number"],
)
def test_what_it_refuses_before_it_loads_anything(
    saved_models: Path, nothing_trained: str, arguments: list[str], code: int, fragments: list[str]
) -> None:
    prelude = "import sys; sys.modules['torch'] = None"
    out, err = chat(str(saved_models), "--work", nothing_trained, *arguments, code=code, prelude=prelude)
    assert out == ""
    assert err.startswith("error: ")
    assert all(fragment in err for fragment in fragments), err


def test_without_torch_it_says_what_to_install(saved_models: Path) -> None:
    prelude = "import sys; sys.modules['torch'] = None"
    _, err = chat(str(saved_models), "--message", "red", code=26, prelude=prelude)
    assert err == "error: chat needs torch, which is not installed: pip install 'trainwright[run]'\n"


def test_a_stage_that_has_begun_is_named(saved_models: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain" / "checkpoints" / "step-000100").mkdir(parents=True)
    _, err = chat(str(saved_models), "--work", str(tmp_path), code=20)
    assert "pretrain has a checkpoint already: --stage pretrain" in err


def test_help_needs_no_torch() -> None:
    prelude = "import sys; sys.modules['torch'] = None"
    out, _ = chat("--help", prelude=prelude)
    for option in ("--stage", "--message", "--system", "--temperature", "--top-k", "--max-tokens", "--seed", "--work"):
        assert option in out


def test_a_turn_reads_only_what_is_new(result: dict[str, Any]) -> None:
    assert result["again"] == [RED_AGAIN]
    assert result["passes"][0] < 35  # of 48 tokens of the prompt
    assert set(result["passes"][1:]) == {1}


def test_pieces_are_whole_characters(result: dict[str, Any]) -> None:
    assert "".join(result["pieces"]) == RED
    assert len(result["pieces"]) > 2
    assert {"\N{ROSE}"} == {character for piece in result["pieces"] for character in piece if ord(character) > 127}


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(result: dict[str, Any]) -> None:
    assert result["forgetful"] == [GREEN, GREEN_AGAIN]
    assert result["notes"] == ["the context is full: forgot the oldest turn"] * 2


def test_a_message_too_long_changes_nothing(result: dict[str, Any]) -> None:
    assert "and the model reads 56 before an answer" in result["too_long"]
    assert result["after_too_long"] == ["green", GREEN, "again", GREEN_AGAIN]


def test_reset_forgets(result: dict[str, Any]) -> None:
    assert result["after_reset"] == [RED_AGAIN]


def test_of_a_stopped_answer_what_was_seen_is_kept(result: dict[str, Any]) -> None:
    assert RED.startswith(result["taken"])
    assert 0 < len(result["taken"]) < len(RED)
    assert result["kept"] == ["red", result["taken"]]


def test_the_seed_decides(result: dict[str, Any]) -> None:
    first, again, other = result["drawn"]
    assert first == again != other


def test_an_answer_is_as_long_as_asked_and_as_there_is_room(result: dict[str, Any]) -> None:
    assert result["cut"] == ["rot", "rot \N{REPLACEMENT CHARACTER}"]  # the second token begins a character
    assert result["longest"] == result["context"] - result["given"] + 1


def test_a_system_message_is_read(result: dict[str, Any]) -> None:
    assert result["system"] > 22


@pytest.fixture(scope="module")
def bytes_only() -> Tokenizer:
    """Each byte of a character outside ASCII is a token."""
    return train(iter(["plain text"]), 270)


@pytest.mark.parametrize("text", ["ascii only", "ä € \N{ROSE} 👩‍🔬", "\N{REPLACEMENT CHARACTER} stays", ""])
def test_text_is_given_out_by_whole_characters(bytes_only: Tokenizer, text: str) -> None:
    stream = TextStream(lambda tokens: bytes_only.decode(list(tokens), skip_special_tokens=False))
    ids = bytes_only.encode(text, add_special_tokens=False).ids
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == text == stream.text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_no_character_come_at_the_end(bytes_only: Tokenizer) -> None:
    stream = TextStream(lambda tokens: bytes_only.decode(list(tokens), skip_special_tokens=False))
    ids = bytes_only.encode("a\N{ROSE}", add_special_tokens=False).ids
    assert [stream.add(token) for token in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *command: object) -> None:
        self.seen = self._raw = ""  # without and with what steers a terminal
        self._position = 0
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background inherit that it is ignored
            os.execv(str(command[0]), [str(word) for word in command])

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def expect(self, text: str, patience_s: float = 120, typing: str = "") -> None:
        """Wait until `text` has been written, after what was expected last; meanwhile type `typing` every 2 s: a key that comes
        just as a line editor takes the terminal over is lost to any program."""
        end, again = time.monotonic() + patience_s, time.monotonic()
        while text not in self.seen[self._position :]:
            assert time.monotonic() < end, self.seen
            if typing and time.monotonic() >= again:
                self.type(typing)
                again = time.monotonic() + 2
            assert self._read(0.2), self.seen
        self._position += self.seen[self._position :].index(text) + len(text)

    def end(self) -> int:
        """The exit code."""
        while self._read(60):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self, patience_s: float) -> bool:
        if not select.select([self._file], [], [], patience_s)[0]:
            return True
        try:
            new = os.read(self._file, 65536).decode(errors="replace")
        except OSError:  # Linux, when the process has ended
            return False
        self._raw += new
        self.seen = ESCAPES.sub("", self._raw).replace("\r", "")
        return True
