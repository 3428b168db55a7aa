"""The `distill` command: one verb a stage, all from the same run file.

Exit codes: 0 done, 2 bad input (one line says what and the way out), 1 a failure of ours, 130 Ctrl-C, 143 SIGTERM. Nothing heavy is
imported here: `distill --help` must answer at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from distill import __version__
from distill.cli import DEFAULT_RUN_FILE
from distill.cli.bundle import bundle
from distill.cli.comparing import compare
from distill.cli.gateway import gateway
from distill.cli.importing import ImportGroup
from distill.cli.keys import keys
from distill.cli.plan import plan
from distill.cli.repository import repository
from distill.cli.store import store
from distill.cli.submit import submit
from distill.cli.tuning import tune
from distill.cluster.environment import set_environment
from distill.errors import ConfigError, DistillError, Terminated

VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("The whole line: images to edge students, and a report.", ()),
    "pretrain": ("Stage 1: train the teacher's backbone without labels (contrastive).", ("data", "pretrain")),
    "finetune": ("Stage 2: teach it the classes from few labels. Needs pretrain.", ("data", "finetune")),
    "import": ("Take a teacher that was trained elsewhere, in place of stages 1 and 2.", ("data", "import")),
    "export-teacher": ("ONNX through the parity gate, into a Triton model repository. Needs finetune or import.", ("teacher",)),
    "make-teacher": (
        "All of the above that the run file asks for, up to the exported teacher.",
        ("data", "pretrain", "finetune", "teacher"),
    ),
    "self-distill": (
        "The teacher teaches a network like itself, which then labels for the students. Needs export-teacher.",
        ("self_distill", "store", "ray", "monitor"),
    ),
    "serve": ("Run the teacher (Triton) and the REST gateway until stopped. Needs export-teacher.", ("server",)),
    "label": ("Fill the soft-label store ahead of training. Needs export-teacher.", ("store", "ray", "train")),
    "sweep": (
        "Train variants of the students on one stream and keep the best, by successive halving. Needs export-teacher.",
        ("sweep", "train", "store", "ray", "monitor"),
    ),
    "train": ("Stage 3: train the students on the teacher's soft labels. Needs export-teacher.", ("train", "store", "ray", "monitor")),
    "evaluate": ("Teacher, students and controls on the test images. Needs train.", ("data", "train")),
    "export-student": ("Edge files of each student, measured, through the int8 gate. Needs train.", ("edge",)),
    "report": ("HTML with plots and JSON, from what is finished. Needs evaluate.", ()),
}
"""Verb -> (what it does, the sections of the run file that steer it)."""

WITHOUT_FRESH = ("serve", "label")
"""Verbs that keep nothing to be done again: labels stay, and another store.path asks anew."""


class VerbCommand(click.Command):
    """A command whose help ends with the fields of its sections."""

    sections: tuple[str, ...] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The fields with their defaults and docstrings."""
        from distill.cli.fields import section_fields

        for section in self.sections:
            with formatter.section(f"Overrides from section `{section}` of the run file"):
                formatter.write_dl([(f"{name}={default}", help_text) for name, default, help_text in section_fields(section)])


class VerbGroup(click.Group):
    """Lists the verbs in the order of the line, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *(name for name in self.commands if name not in VERBS)]


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="distill")
def cli() -> None:
    """Distil one big image classifier into small students, from unlabelled images.

    Every verb reads the same run file (--config) and takes overrides such as `train.epochs=3`. A stage that is finished with the same
    settings is reused.
    """


@cli.command("install-triton")
@click.option("--home", type=click.Path(path_type=Path), help="Folder to install into. Default: $DISTILL_TRITON_HOME, else .triton")
def install_triton(home: Path | None) -> None:
    """Install the real Triton server (from the nvidia-pytriton wheel) in a folder of its own; says why where it cannot run."""
    from distill.progress import console
    from teacher_server.triton_home import triton_home, triton_supported
    from teacher_server.triton_install import install_triton as install

    unsupported = triton_supported()
    if unsupported:
        console.print(f"Triton cannot run here: {unsupported}. The teacher will run embedded (ONNX Runtime).")
        return
    console.print(f"Triton is in {install(triton_home(str(home) if home else None)).path}")


cli.add_command(keys)


def _run_verb(verb: str, config: Path, fresh: bool, overrides: tuple[str, ...]) -> None:
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))  # first: a wrong word is refused at once, not after seconds of imports

    from distill.cli import quickstart, reporting, serving, verbs
    from distill.cli.run import Run

    run = Run(file)
    simple: dict[str, Callable[[Run], Any]] = {
        "quickstart": quickstart.quickstart,
        "pretrain": verbs.pretrain,
        "finetune": verbs.finetune,
        "import": verbs.import_teacher,
        "export-teacher": verbs.export_teacher,
        "make-teacher": verbs.make_teacher,
        "self-distill": verbs.self_distill,
        "serve": serving.serve,
        "export-student": verbs.export_student,
        "report": reporting.report,
    }
    asking: dict[str, Callable[[Run, Any], Any]] = {
        "label": verbs.label,
        "sweep": verbs.sweep,
        "train": verbs.train,
        "evaluate": verbs.evaluate,
    }
    if verb == "sweep":
        _ = run.sweep_training  # a grid that says something impossible is refused before the teacher is started
    if fresh:
        verbs.forget(run, verb)
    if verb in simple:
        simple[verb](run)
    else:
        with verbs.served_teacher(run) as served:
            asking[verb](run, served.address)


def _add_verb(verb: str, summary: str, sections: tuple[str, ...]) -> None:
    @click.option("--config", type=click.Path(path_type=Path), default=DEFAULT_RUN_FILE, show_default=True, help="The run file (YAML).")
    @click.option("--fresh", is_flag=True, help="Do it again, even if it is finished. What was there is moved to RUN_DIR/old.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error and the log.")
    @click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
    def command(config: Path, debug: bool, overrides: tuple[str, ...], fresh: bool = False) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        _run_verb(verb, config, fresh, overrides)

    params = [p for p in reversed(getattr(command, "__click_params__", [])) if p.name != "fresh" or verb not in WITHOUT_FRESH]
    added = VerbCommand(verb, callback=command, params=params, help=summary, short_help=summary)
    added.sections = sections
    cli.add_command(ImportGroup(added) if verb == "import" else added)


for _verb, (_summary, _sections) in VERBS.items():
    _add_verb(_verb, _summary, _sections)
cli.add_command(repository)
cli.add_command(store)
cli.add_command(tune)
cli.add_command(plan)
cli.add_command(compare)
cli.add_command(bundle)
cli.add_command(gateway)
cli.add_command(submit)


def entry() -> NoReturn:
    """What the installed `distill` script calls: runs the command and ends the process with the right code."""
    signal.signal(signal.SIGTERM, _terminate)
    set_environment()
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command line; the answer is the exit code. Errors become one line, with --debug after their traceback."""
    try:
        code = cli.main(arguments, prog_name="distill", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:  # `distill` alone
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        return _say(f"{error.format_message()} (distill --help lists the verbs)", ConfigError.exit_code)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # click takes every EOFError, a file cut short too, for Ctrl-D at a prompt
            return _unforeseen(stop.__cause__, arguments)
        code = 143 if isinstance(stop.__cause__ or stop, Terminated) else 130  # click raises its Abort from it
        return _say("stopped; what is finished is kept, the same command goes on from there", code)
    except DistillError as error:
        if "--debug" in arguments:
            traceback.print_exception(error)
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output is gone; nothing more to say
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: said in one line
        return _unforeseen(error, arguments)
    return code if isinstance(code, int) else 0  # of a command that ended its context with one


def _unforeseen(error: Exception, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    return _say(f"unforeseen {type(error).__name__}: {error} (a fault of ours; --debug shows where)", 1)


def _say(message: str, code: int) -> int:
    click.echo(f"distill: {' '.join(message.split())}", err=True)
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: every block closes what it opened."""
    raise Terminated


if __name__ == "__main__":
    entry()
