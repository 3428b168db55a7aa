"""`distill bundle`: students as single archives with a manifest, and whether such an archive is whole.

Exit codes: 0 whole, 2 something is missing, altered, extra, cut short or unsafe. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path

import click

from distill.cli import DEFAULT_RUN_FILE


@click.group("bundle", short_help="Students as archives: make, verify.")
def bundle() -> None:
    """A student as one archive: the files that are shipped, its card, a program that runs them, a manifest with checksums."""


@bundle.command()
@click.option("--config", type=click.Path(path_type=Path), default=DEFAULT_RUN_FILE, show_default=True, help="The run file (YAML).")
@click.option("--student", "students", multiple=True, help="A student; may be given several times. Default: all that were exported.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the archives. Default: RUN_DIR/bundles.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def make(config: Path, students: tuple[str, ...], out: Path | None, debug: bool, overrides: tuple[str, ...]) -> None:
    """One archive a student, NAME.tar, with its checksum beside it. Needs export-student. The same student gives the same bytes."""
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))

    from distill.cli.run import Run
    from distill.cli.student_cards import write_cards
    from distill.errors import ConfigError
    from distill.progress import console
    from export.bundle import make_bundle

    run = Run(file)
    made = write_cards(run)  # anew: the run may have been evaluated since
    unknown = sorted(set(students) - set(made))
    if unknown:
        raise ConfigError(f"no student {', '.join(unknown)} was exported; there are: {', '.join(made)}")
    for name in students or made:
        target = (out or run.folder / "bundles") / f"{name}.tar"
        manifest = make_bundle(run.edge.folder / name, target)
        console.print(f"{target}: {len(manifest.files)} files, take {manifest.recommended}", markup=False)


@bundle.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
def verify(debug: bool, bundles: tuple[Path, ...]) -> None:
    """Every file of a BUNDLE (an archive, or the folder it was unpacked into) against its manifest. Nothing is unpacked."""
    from distill.errors import BadInput
    from export.bundle_check import check_bundle

    broken = []
    for path in bundles:
        try:
            check = check_bundle(path)
        except BadInput as error:
            click.echo(_plain(str(error)))
            broken.append(f"{path} (unreadable)")
            continue
        for problem in check.problems:
            click.echo(f"{path}: {_plain(problem)}")
        if check.problems:
            broken.append(f"{path} ({len(check.problems)})")
        else:
            click.echo(f"{path}: whole, {check.num_files} files of student {check.student}")
    if broken:
        raise BadInput(f"not whole: {', '.join(broken)}; get it again from where it was made")


def _plain(said: str) -> str:
    """What may quote an archive from outside, without anything that steers a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in said)
