"""`distill import KIND`: the options of every way to bring a teacher, turned into `ImportSettings`. The work is in `teacher_import.py`.

Nothing heavy is imported here before a command runs: `distill --help` must answer at once.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]
FROM_RUN_FILE = "run-file"
"""Hidden name of what `distill import` does without a kind."""


class ImportGroup(click.Group):
    """`distill import KIND ...`, or, without a kind, the verb that reads the run file's `import` section."""

    def __init__(self, from_run_file: click.Command) -> None:
        super().__init__("import", help=from_run_file.help, short_help=from_run_file.short_help)
        self.from_run_file = from_run_file
        from_run_file.hidden = True
        self.add_command(from_run_file, FROM_RUN_FILE)
        for command in (simclr, timm, torch, onnx):
            self.add_command(command)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Hand everything that does not begin with a kind to the run-file form; a lone word that is no override is a misspelt kind."""
        if args and args[0] not in self.commands and not args[0].startswith("-") and "=" not in args[0]:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"there is no kind of import {args[0]!r}; {hint}", ctx)
        if not args or (args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx)):
            args = [FROM_RUN_FILE, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The kinds, as in the documentation."""
        return [name for name in self.commands if name != FROM_RUN_FILE]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both forms."""
        formatter.write_usage(ctx.command_path, "KIND [OPTIONS] ...")
        formatter.write_usage(ctx.command_path, "[OPTIONS] [SECTION.KEY=VALUE]...", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The kinds, then the options of the form without one."""
        self.format_commands(ctx, formatter)
        self.from_run_file.format_options(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The fields of the run file."""
        self.from_run_file.format_epilog(ctx, formatter)


def _triple(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """`.485,.456,.406` -> one number for each of R, G, B."""
    if value is None:
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise click.BadParameter(f"{value!r} is not three numbers with commas between them, such as 0.485,0.456,0.406", ctx, param)
    return numbers


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_PATH = click.Path(path_type=Path)
_OUT = _options(
    click.option("--out", "folder", type=_PATH, required=True, help="The folder to make. It must not be there, or be empty."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error and the log."),
)
_CLASSES_HELP = 'A file with one name a line, a JSON list or {"0": "name"}, or names with commas; in the order of the logits.'
_CLASSES = click.option("--classes", metavar="FILE|A,B,C", required=True, help=_CLASSES_HELP)
_CROPS = _options(
    click.option("--image-size", type=int, help="Height and width of the crops it was trained on. Default: the network's own."),
    click.option("--crop-ratio", type=float, help="The evaluation crop's share of the shorter side. Default: the network's own, or usual."),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="Filter that resized the images it was trained on. Default: the network's own, bicubic for SimCLR, else bilinear.",
    ),
)
_NORMALISING = _options(
    click.option(
        "--mean",
        metavar="R,G,B",
        callback=_triple,
        help="Mean of R, G, B it was trained with, on the scale 0 to 1. Default: the network's own.",
    ),
    click.option("--std", metavar="R,G,B", callback=_triple, help="Standard deviation, on the same scale. Default: the network's own."),
)
_EMA = click.option("--ema", is_flag=True, help="Take the moving average of the weights that lies beside them in the file.")


@click.command("simclr", short_help="A published SimCLRv2 checkpoint (TensorFlow).")
@click.argument("path", type=_PATH)
@_OUT
@click.option("--classes", metavar="FILE|A,B,C", help=f"{_CLASSES_HELP} Default: the numbers from 0.")
@_CROPS
@click.option(
    "--classifier-after",
    type=int,
    help="Layers of the projection head below the classifier; -1 for all. Default: what the checkpoint shows.",
)
@click.option(
    "--take",
    type=click.Choice(["auto", "classifier", "pretrained"]),
    default="auto",
    show_default=True,
    help="What a run goes on with where both are there. auto: a classifier that only looked on in pretraining is not the teacher.",
)
@_EMA
def simclr(path: Path, classifier_after: int | None, take: str, **options: Any) -> None:
    """Read a checkpoint of the official code, TF1 or TF2, pretrained or fine-tuned: its folder, or a prefix such as model.ckpt-751."""
    _bring({"kind": "simclr", "path": str(path), "classifier_after": classifier_after, "take": take}, **options)


@click.command("timm", short_help="One of timm's networks (extra `timm`).")
@click.argument("name")
@click.argument("weights", type=_PATH, required=False)
@_OUT
@_CLASSES
@_CROPS
@_NORMALISING
@_EMA
def timm(name: str, weights: Path | None, **options: Any) -> None:
    """Take timm's network NAME with the weights of a local .safetensors or .pth. Nothing is downloaded: without WEIGHTS they are random."""
    _bring({"kind": "timm", "timm_name": name, "path": str(weights) if weights else None}, **options)


@click.command("torch", short_help="A torch state dict of a network named by --arch.")
@click.argument("weights", type=_PATH)
@click.option("--arch", required=True, help="timm:NAME, or ours: resnetDEPTH[-xWIDTH][-sk[RATIO]][-cifar], such as resnet152-x3-sk.")
@_OUT
@_CLASSES
@_CROPS
@_NORMALISING
@_EMA
def torch(weights: Path, arch: str, **options: Any) -> None:
    """Read a state dict: .safetensors, or a .pth that holds tensors only (pickled code is never run).

    ResNets of torchvision are --arch timm:resnet50 and the like: the names and the network are the same.
    """
    from distill.models.arch_names import arch_name, parse_arch

    _bring({"kind": "torch", "path": str(weights), "arch": arch_name(parse_arch(arch))}, **options)


@click.command("onnx", short_help="A ready ONNX classifier.")
@click.argument("file", type=_PATH)
@_OUT
@_CLASSES
@_CROPS
@_NORMALISING
@click.option("--logits", metavar="TENSOR", help="The tensor with the logits, where there are several outputs or a softmax at the end.")
@click.option(
    "--images", required=True, metavar="GLOB", help="A few real images for the parity gate: 'photos/*.jpg' (quoted), or a folder."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="What the teacher computes in. Default: what its weights are in."
)
@click.option(
    "--input-size", type=int, help="Height and width of the crops that travel, where the graph is to resize them to --image-size."
)
@click.option("--top-outputs", type=int, help="For many classes: also give this many of the largest logits, with their class ids.")
def onnx(
    file: Path,
    logits: str | None,
    images: str,
    precision: str | None,
    input_size: int | None,
    top_outputs: int | None,
    **options: Any,
) -> None:
    """Wrap an ONNX classifier of images, float (say its --mean and --std) or uint8, NCHW or NHWC, and compare it with the original."""
    teacher = {"precision": precision, "input_size": input_size, "top_outputs": top_outputs}
    given = {name: value for name, value in teacher.items() if value is not None}
    _bring({"kind": "onnx", "path": str(file), "logits": logits}, images=images, teacher_fields=given, **options)


def _bring(
    fields: dict[str, Any],
    folder: Path,
    classes: str | None,
    debug: bool,
    ema: bool = False,
    images: str = "",
    teacher_fields: dict[str, Any] | None = None,
    **stated: Any,
) -> None:
    """The command's work: settings checked, teacher brought, said what was found and how a run file takes it."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from distill.class_lists import read_class_names
    from distill.config import validate
    from distill.progress import console
    from export.settings import ImportSettings, StatedPreprocessing, TeacherExportSettings

    settings = validate(ImportSettings, {**fields, "use_ema": ema}, origin="import")
    preprocessing = validate(StatedPreprocessing, stated, origin="import")
    teacher = validate(TeacherExportSettings, teacher_fields or {}, origin="import")
    class_names = read_class_names(classes) if classes else None

    from distill.cli.import_report import describe, run_file_lines  # brings torch: after what is quickly refused
    from distill.cli.teacher_import import import_into, import_into_new

    def sample(seen: Any) -> Any:
        from export.parity_images import parity_crops

        return parity_crops(images, seen, teacher.num_crops)

    result = import_into_new(
        folder,
        lambda pending: import_into(
            settings, pending, class_names=class_names, preprocessing=preprocessing, teacher=teacher, sample=sample
        ),
    )
    for line in describe(result, folder):
        console.print(line, markup=False)
    if lines := run_file_lines(result, folder):
        console.print("In a run file:\n" + lines.rstrip(), markup=False)
