"""`distill repository ensemble`: member words and images of the command line -> a teacher folder.

Unit of data: one ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.cli.run_file import RunFile
from distill.cli.teacher_import import import_into_new
from distill.config import validate
from distill.crops import Interpolation
from distill.errors import ConfigError
from distill.progress import console
from export.ensemble import ensemble_preprocessing, export_ensemble, provenance, read_members
from export.parity_images import parity_crops
from export.settings import TeacherExportSettings
from export.teacher import TEACHER_FILE


def make_ensemble(
    name: str,
    words: Sequence[str],
    out: Path,
    images: str | None,
    file: RunFile | None,
    *,
    default_temperature: float = 1.0,
    crop_ratio: float | None = None,
    interpolation: Interpolation | None = None,
) -> None:
    """Average the members into a new teacher folder and say what came out.

    Args:
        name: of the teacher.
        words: `PATH[:WEIGHT]` of each member.
        out: the teacher folder to make.
        images: real images for the parity gate; None takes the unlabelled images of the run file.
        file: the run file, if there is one.

    Raises:
        ConfigError: a member, name or folder that cannot be; neither images nor a run file.
        ParityError: the graph does not say what the mean of the members says.
    """
    settings = validate(TeacherExportSettings, {"name": name, "default_temperature": default_temperature}, origin="ensemble")
    members = read_members([member_word(word) for word in words])
    preprocessing = ensemble_preprocessing(members, crop_ratio, interpolation)
    images = images or (file.data.unlabelled.path if file else None)
    if images is None:
        raise ConfigError("the parity gate needs real images: give --images 'photos/*.jpg' (quoted) or a folder")

    def work(folder: Path) -> dict[str, str]:
        crops_NHWC, ids = parity_crops(images, preprocessing, settings.num_parity_images)
        return {"fingerprint": export_ensemble(members, preprocessing, crops_NHWC, ids, folder, settings).fingerprint}

    fingerprint = import_into_new(out, work)["fingerprint"]
    for entry in provenance(members):
        console.print(f"  {entry['weight']:.3f} x {entry['name']} {str(entry['fingerprint'])[:12]} ({entry['path']})", markup=False)
    console.print(f"ensemble {name}, teacher {fingerprint[:12]}, passed the parity gate: {out / TEACHER_FILE}", markup=False)


def member_word(word: str) -> tuple[Path, float]:
    """`PATH[:WEIGHT]` -> path and weight; a path that is there as a whole has no weight behind it.

    Raises:
        ConfigError: what stands behind the last colon is no number.
    """
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise ConfigError(
            f"--member {word!r}: there is nothing at that path, and {weight!r} is no weight; give PATH or PATH:NUMBER"
        ) from error
