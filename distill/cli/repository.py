"""`distill repository`: the versions of the teachers in a Triton model repository, and teachers made of several.

Nothing heavy is imported here before a command runs: `distill --help` must answer at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from distill.cli import DEFAULT_RUN_FILE

if TYPE_CHECKING:
    from distill.cli.run_file import RunFile
    from export.settings import RepositorySettings

Command = Callable[..., None]
_PATH = click.Path(path_type=Path)


class Place(NamedTuple):
    """Which repository is meant."""

    repository: Path
    file: RunFile | None
    """The run file, where the repository is that of a run."""

    def settings(self, source: Path) -> RepositorySettings:
        """How the teacher in `source` is to be run, if it is a new model here. Raises as `read_teacher_info`."""
        from distill.cli.tuning_file import tuned_settings
        from export.fingerprint import read_teacher_info
        from export.imports import teacher_file
        from export.settings import RepositorySettings

        if self.file is None:
            return RepositorySettings()
        fingerprint = read_teacher_info(teacher_file(source)).fingerprint
        return tuned_settings(self.file.teacher, Path(self.file.run_dir), fingerprint).repository


@click.group("repository", short_help="The versions of a teacher: add, list, activate, remove; ensemble makes one of several.")
def repository() -> None:
    """Versions of the teachers in the model repository that Triton serves.

    The repository is that of the run file (--config), or the folder that --repository names.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_WHERE = _options(
    click.option("--config", type=_PATH, default=DEFAULT_RUN_FILE, show_default=True, help="The run file whose repository is meant."),
    click.option("--repository", "folder", type=_PATH, help="Another folder, whatever the run file says."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error and the log."),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
)
_TRITON = click.option(
    "--triton",
    metavar="HOST:PORT",
    help="gRPC endpoint of a Triton that serves this repository. Default: the one that a running `distill serve` of the run started.",
)


@repository.command("add", short_help="Put a teacher in as the next version, without serving it.")
@click.argument("source", type=_PATH, metavar="TEACHER_FOLDER|MODEL.ONNX")
@click.option("--name", help="Name of the model. Default: the name that the teacher bears.")
@click.option("--activate", "then_activate", is_flag=True, help="Then serve it, as `distill repository activate` does.")
@_TRITON
@_WHERE
def add(source: Path, name: str | None, then_activate: bool, triton: str | None, **where: Any) -> None:
    """Put a teacher in that `distill export-teacher`, `distill import` or `distill repository ensemble` made.

    It becomes the next version of its model and is not served yet; only the first version of a new model is served at once.
    """
    place = _place(**where)
    from distill.progress import console
    from export.repository_versions import add_version

    info, active = add_version(place.repository, source, place.settings(source), name=name)
    console.print(f"added version {info.version} of {info.name}, teacher {info.fingerprint[:12]}, in {place.repository}", markup=False)
    if active:
        console.print("  the model is new here, so this version is the served one")
    if then_activate:
        _activate(place.repository, info.name, info.version, triton)
    elif not active:
        console.print(f"  to serve it: distill repository activate {info.name} {info.version}")


@repository.command("list", short_help="Models and versions, and which one is served.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@_WHERE
def list_(as_json: bool, **where: Any) -> None:
    """Show every version of every model. Each file is checked against its fingerprint."""
    place = _place(**where)
    from rich.table import Table

    from distill.progress import console
    from export.repository_versions import list_versions

    versions = list_versions(place.repository)
    if as_json:
        click.echo(json.dumps([version.model_dump(mode="json") for version in versions], indent=1))
        return
    table = Table(title=f"model repository {place.repository}", title_justify="left")
    for heading in ("model", "version", "served", "fingerprint", "classes", "crop", "precision", "size", "added", ""):
        table.add_column(heading, justify="right" if heading in ("version", "classes", "crop", "size") else "left")
    for version in versions:
        table.add_row(
            version.model,
            str(version.version),
            "yes" if version.served else "",
            (version.fingerprint or "-")[:12],
            str(version.num_classes or "-"),
            str(version.image_size or "-"),
            version.precision or "-",
            f"{version.size_bytes / 1e6:.1f} MB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(version.added_at)),
            version.problem or "",
        )
    console.print(table if versions else f"model repository {place.repository} is empty", markup=False)


@repository.command("activate", short_help="Serve another version, also in a running Triton, without a failed request.")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@_TRITON
@_WHERE
def activate(name: str, version: int, triton: str | None, **where: Any) -> None:
    """Make VERSION of the model NAME the served one.

    A Triton that is running takes it at once: the new version is loaded beside the old one and must give a label before it takes its place;
    requests of the old one are answered to their end. Other Tritons take it at their next start.
    """
    _activate(_place(**where).repository, name, version, triton)


@repository.command("remove", short_help="Take a version out for good; never the served one.")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@_WHERE
def remove(name: str, version: int, **where: Any) -> None:
    """Delete VERSION of the model NAME. Its number is never given again."""
    place = _place(**where)
    from distill.cli.serving_record import running_service
    from distill.errors import ConfigError
    from distill.progress import console
    from export.repository_versions import remove_version

    service = running_service(place.repository)
    if service and service.model == name and service.triton_url:
        from teacher_server.activation import triton_control

        with triton_control(service.triton_url) as control:
            running = control.config(name)
        if running is not None and version in running.version_policy.specific.versions:
            raise ConfigError(f"version {version} of {name} is being served at {service.triton_url}: activate another one first")
    remove_version(place.repository, name, version)
    console.print(f"removed version {version} of {name} from {place.repository}", markup=False)


@repository.command("ensemble", short_help="Average several teachers into one.")
@click.argument("name")
@click.option(
    "--member",
    "members",
    multiple=True,
    required=True,
    metavar="PATH[:WEIGHT]",
    help="A teacher folder or its model.onnx, and its weight (default 1); at least two.",
)
@click.option("--out", type=_PATH, required=True, help="The teacher folder to make. It must not be there, or be empty.")
@click.option("--images", metavar="GLOB", help="Real images for the parity gate: 'photos/*.jpg', a folder. Default: those of the run file.")
@click.option("--temperature", "default_temperature", type=float, default=1.0, show_default=True, help="Used when a request names none.")
@click.option("--crop-ratio", type=float, help="The evaluation crop's share of the shorter side, where the members differ in it.")
@click.option(
    "--interpolation", type=click.Choice(["bilinear", "bicubic"]), help="The evaluation crop's filter, where the members differ in it."
)
@click.option("--add", "then_add", is_flag=True, help="Then put it into the repository, as `distill repository add` does.")
@_WHERE
def ensemble(name: str, members: tuple[str, ...], out: Path, images: str | None, then_add: bool, **options: Any) -> None:
    """Make one teacher NAME whose logits are the weighted mean of the members' logits: served, stored and activated like any other."""
    stated = {key: options.pop(key) for key in ("default_temperature", "crop_ratio", "interpolation")}
    # With images of its own, an ensemble that is not put into a repository needs neither run file nor repository.
    needs_place = then_add or images is None or options["overrides"]
    place = _place(**options) if needs_place else None
    from distill.cli.ensemble import make_ensemble

    make_ensemble(name, members, out, images, place.file if place else None, **stated)
    if then_add and place:
        from distill.progress import console
        from export.repository_versions import add_version

        info, active = add_version(place.repository, out, place.settings(out))
        served = "the served one" if active else f"to serve it: distill repository activate {info.name} {info.version}"
        console.print(f"added version {info.version} of {info.name} in {place.repository}; {served}", markup=False)


def _place(config: Path, folder: Path | None, debug: bool, overrides: tuple[str, ...]) -> Place:
    """The repository that the options name. What is wrong with them is refused before anything heavy is imported."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from distill.errors import ConfigError

    if folder is not None:
        if overrides:
            raise ConfigError(f"{overrides[0]!r} overrides the run file, but --repository names the folder itself: leave one of them out")
        return Place(folder, None)
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))
    return Place(Path(file.run_dir) / "model_repository", file)


def _activate(repository: Path, name: str, version: int, triton: str | None) -> None:
    """On disk, and in the Triton that is named or that a service of the run started."""
    from distill.cli.serving_record import running_service
    from distill.progress import console
    from export.fingerprint import read_teacher_info
    from export.repository_versions import activate_version, activation

    config = activation(repository, name, version)
    service = running_service(repository)
    url = triton or (service.triton_url if service and service.model == name else None)
    if url is None:
        from export.first_answer import require_answer

        model = repository / name / str(version) / "model.onnx"
        require_answer(model, read_teacher_info(model))  # no Triton says whether it gives labels
        activate_version(repository, name, version)
        told = "no running Triton of this run has it; the next one that is started serves it"
        if service and service.model == name:
            told = f"the running service (process {service.pid}) keeps its own teacher until it is started again"
    else:
        from teacher_server.activation import swap_version, triton_control

        with triton_control(url) as control:
            outcome = swap_version(control, config, lambda: activate_version(repository, name, version))
        told = {"swapped": f"Triton at {url} changed over to it", "loaded": f"Triton at {url} has loaded it"}.get(
            outcome, f"Triton at {url} was serving it already"
        )
    console.print(f"version {version} of {name} is the served one: {told}", markup=False)
