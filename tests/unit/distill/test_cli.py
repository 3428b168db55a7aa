"""The command: help at once and in order, exit codes, one line for what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from distill import __version__
from distill.cli import main as module
from distill.cli.fields import section_fields
from distill.cli.main import VERBS, run_command
from distill.errors import BadInput, DistillError, SourceError, TeacherUnavailable, Terminated

HEAVY = ("torch", "ray", "pydantic", "numpy", "onnx", "onnxruntime", "fastapi", "rich", "yaml", "PIL")
IN_ORDER = [
    "quickstart",
    "pretrain",
    "finetune",
    "import",
    "export-teacher",
    "make-teacher",
    "self-distill",
    "serve",
    "label",
    "sweep",
    "train",
    "evaluate",
    "export-student",
    "report",
]


def in_new_process(code: str) -> Any:
    """What `code` prints as its last line, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes every verb end with an error."""

    def install(error: BaseException) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(module, "_run_verb", fail)

    return install


class TestHelp:
    def test_imports_nothing_heavy_and_is_quick(self) -> None:
        """CPU seconds, not wall clock: other jobs on this machine do not count. The promise is half a second."""
        code = f"""
import json, sys, time
from distill.cli.main import run_command
code = run_command(["--help"])
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules], time.process_time()]))
"""
        exit_code, imported, cpu_s = in_new_process(code)
        assert exit_code == 0
        assert imported == []
        assert cpu_s < 0.5

    def test_lists_the_verbs_in_the_order_of_the_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["--help"]) == 0
        listed = [
            line.split()[0]
            for line in capsys.readouterr().out.partition("Commands:")[2].splitlines()
            if line.startswith("  ") and line[2] != " "
        ]
        assert listed[: len(IN_ORDER)] == IN_ORDER == list(VERBS)

    def test_alone_it_is_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command([]) == 2
        said = capsys.readouterr().err
        assert said.startswith("Usage: distill")
        assert "\n  quickstart " in said

    @pytest.mark.parametrize("verb", IN_ORDER)
    def test_every_verb_shows_its_fields(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        summary, sections = VERBS[verb]
        assert summary.split()[0] in shown
        for option in ("--config", "--debug"):
            assert option in shown
        assert ("--fresh" in shown) == (verb not in ("serve", "label"))  # these two keep nothing to be done again
        words = set(shown.split())
        for section in sections:
            assert f"section `{section}`" in shown
            for name, default, _ in section_fields(section):
                assert any(word.startswith(f"{name}=") for word in words), f"{name}={default}"

    def test_defaults_and_docstrings_are_in_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        run_command(["pretrain", "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "pretrain.network.depth=50 Layers of the ResNet: 18, 34," in words
        assert "data.unlabelled.path=(required) A folder (class folders or flat)" in words

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["--version"]) == 0
        assert __version__ in capsys.readouterr().out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert line.startswith("distill: ")
    return line


class TestBadInput:
    """Exit code 2, one line."""

    def test_bad_override(self, capsys: pytest.CaptureFixture[str]) -> None:
        recipe = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")
        assert run_command(["train", "--config", recipe, "nonsense"]) == 2
        assert "override 'nonsense' is not of the form section.key=value" in one_line(capsys)
        assert run_command(["train", "--config", recipe, "train.epoch=3"]) == 2
        assert "train.epoch: unknown key; did you mean 'epochs'?" in one_line(capsys)
        assert run_command(["train", "--config", recipe, "train.epochs=0"]) == 2
        assert "(given: 0)" in one_line(capsys)

    def test_missing_run_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert run_command(["pretrain", "--config", str(tmp_path / "none.yaml")]) == 2
        assert "none.yaml does not exist; give one with --config" in one_line(capsys)

    def test_unknown_verb_or_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, said in ((["trian"], "trian"), (["train", "--nope"], "--nope"), (["train", "--config"], "--config")):
            assert run_command(arguments) == 2
            line = one_line(capsys)
            assert said in line
            assert "distill --help lists the verbs" in line

    def test_refused_before_anything_heavy_is_imported(self, tmp_path: Path) -> None:
        code = f"""
import json, sys
from distill.cli.main import run_command
code = run_command(["train", "--config", {str(tmp_path / "none.yaml")!r}])
print(json.dumps([code, "torch" in sys.modules or "ray" in sys.modules]))
"""
        assert in_new_process(code) == [2, False]

    def test_from_any_stage(self, capsys: pytest.CaptureFixture[str], failing: Callable[[BaseException], None]) -> None:
        failing(SourceError("photos holds no images;\n  give another"))
        assert run_command(["train"]) == 2
        assert one_line(capsys) == "distill: photos holds no images; give another"


class TestFailures:
    @pytest.mark.parametrize("error", [TeacherUnavailable("the teacher is away"), DistillError("the teacher is away")])
    def test_ours(self, error: DistillError, capsys: pytest.CaptureFixture[str], failing: Callable[[BaseException], None]) -> None:
        failing(error)
        assert run_command(["train"]) == 1
        assert one_line(capsys) == "distill: the teacher is away"

    @pytest.mark.parametrize(
        "error", [ZeroDivisionError("by zero"), OSError("disk"), EOFError("cut short"), KeyError("k"), RuntimeError("a\nb")]
    )
    def test_unforeseen(self, error: Exception, capsys: pytest.CaptureFixture[str], failing: Callable[[BaseException], None]) -> None:
        failing(error)
        assert run_command(["train"]) == 1
        line = one_line(capsys)
        assert f"unforeseen {type(error).__name__}" in line
        assert "--debug shows where" in line

    @pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (click.Abort(), 130), (Terminated(), 143)])
    def test_stopped(
        self, error: BaseException, code: int, capsys: pytest.CaptureFixture[str], failing: Callable[[BaseException], None]
    ) -> None:
        failing(error)
        assert run_command(["train"]) == code
        assert "stopped; what is finished is kept" in one_line(capsys)

    @pytest.mark.parametrize(("error", "code"), [(BadInput("x"), 2), (ZeroDivisionError("x"), 1), (EOFError("x"), 1)])
    def test_debug_shows_the_traceback(
        self, error: Exception, code: int, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        failing(error)
        assert run_command(["train", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err

    def test_sigterm_is_a_ctrl_c_of_its_own(self) -> None:
        assert issubclass(Terminated, KeyboardInterrupt)
        with pytest.raises(Terminated):
            module._terminate(15, None)

    def test_done_is_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(module, "_run_verb", lambda *arguments: seen.append(arguments))
        assert run_command(["train", "--config", "x.yaml", "--fresh", "a.b=1", "c=2"]) == 0
        assert run_command(["label", "--config", "x.yaml"]) == 0
        assert run_command(["label", "--config", "x.yaml", "--fresh"]) == 2
        assert seen == [("train", Path("x.yaml"), True, ("a.b=1", "c=2")), ("label", Path("x.yaml"), False, ())]


class TestProcess:
    """The installed script, as a shell sees it."""

    @pytest.mark.parametrize(
        ("code", "raised"), [(2, "BadInput('x')"), (1, "DistillError('x')"), (1, "ValueError('x')"), (130, "KeyboardInterrupt()")]
    )
    def test_exit_code(self, code: int, raised: str) -> None:
        program = f"""
import sys
from distill.cli import main
from distill.errors import BadInput, DistillError
def fail(*_): raise {raised}
main._run_verb = fail
sys.argv = ["distill", "train"]
main.entry()
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
