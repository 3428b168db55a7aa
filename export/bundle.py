"""A student as one archive: the files that are shipped, its card, a program that runs them, and a manifest with the SHA-256 of each.

    NAME.tar
      NAME/manifest.json    first
      NAME/card.md  card.json  edge.json  parity.json  run_student.py  NAME.fp32.onnx ...

Unit of data: one archive. Its bytes are a function of its content: names in order, no times, no owners.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from distill.errors import BadInput, StageMissing
from export.bundle_check import is_safe
from export.bundle_manifest import MANIFEST, BundledFile, BundleManifest, checksum_of
from export.card import CARD_JSON, CARD_MARKDOWN, StudentCard, markdown
from export.edge import EDGE_FILE, EdgeReport, read_edge_report
from export.files import first_line, sha256_of, write_atomically
from export.gate import MIN_INT8_WEIGHT_SHARE
from export.parity_files import REPORT_FILE
from export.quantize import int8_weight_share
from export.standalone import PROGRAM

_AGAIN = "run `distill export-student --fresh` again"


def make_bundle(folder: Path, target: Path) -> BundleManifest:
    """Write the student in `folder` as an archive, and its checksum into `target`.sha256, in the form of sha256sum.

    Args:
        folder: of one student, made by `export_student`, with its card.
        target: the archive; replaced whole or not at all.

    Raises:
        StageMissing: something is not there.
        BadInput: a file is not what `edge.json` says of it, or says int8 and holds floats; the card is of other files; the student has a
            name that a bundle cannot have.
    """
    report = read_edge_report(folder)
    if not is_safe(report.student.name):
        raise BadInput(f"student {report.student.name!r} has a name that not every system unpacks; call it otherwise")
    names = sorted({*_measured(folder, report), *_told(folder, report)})
    manifest = BundleManifest(
        student=report.student.name,
        recommended=report.recommended,
        files={name: BundledFile(sha256=sha256_of(folder / name), size_bytes=(folder / name).stat().st_size) for name in names},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    pending = target.with_name(f".{target.name}.{os.getpid()}.pending")
    try:
        with tarfile.open(pending, "w", format=tarfile.PAX_FORMAT) as archive:
            described = (manifest.model_dump_json(indent=2) + "\n").encode()
            archive.addfile(_entry(manifest.student, MANIFEST, len(described)), io.BytesIO(described))
            for name in names:
                with (folder / name).open("rb") as content:
                    archive.addfile(_entry(manifest.student, name, manifest.files[name].size_bytes), content)
        digest = sha256_of(pending)
        with pending.open("rb") as written:
            os.fsync(written.fileno())
        pending.replace(target)
    finally:
        pending.unlink(missing_ok=True)
    write_atomically(checksum_of(target), f"{digest}  {target.name}\n".encode())
    return manifest


def _measured(folder: Path, report: EdgeReport) -> Iterable[str]:
    """The files of the student itself, each still what was measured."""
    for file in report.files:
        if not file.shipped:
            continue
        for name, digest in {file.path: file.sha256, **file.beside}.items():
            _require(folder / name)
            if sha256_of(folder / name) != digest:
                raise BadInput(f"{folder / name} is not the file that was measured; {_AGAIN}")
            yield name
        if file.kind == "int8" and file.runtime == "onnxruntime":
            share = int8_weight_share(folder / file.path)
            if share < MIN_INT8_WEIGHT_SHARE:
                raise BadInput(f"{folder / file.path} says int8, but only {share:.0%} of its weights are")
    for package in report.not_measured:
        for name, digest in package.files.items():
            _require(folder / name)
            if sha256_of(folder / name) != digest:
                raise BadInput(f"{folder / name} is not the file that was made; {_AGAIN}")
            yield name


def _told(folder: Path, report: EdgeReport) -> Iterable[str]:
    """What says something about them, a card of these very files, and the program that runs them."""
    for name in (CARD_JSON, CARD_MARKDOWN, EDGE_FILE, REPORT_FILE, PROGRAM):
        _require(folder / name)
        yield name
    try:
        card = StudentCard.model_validate_json((folder / CARD_JSON).read_bytes())
    except ValidationError as error:
        raise BadInput(f"{folder / CARD_JSON} is no student card: {first_line(error)}; {_AGAIN}") from error
    if card.edge != report or markdown(card) != (folder / CARD_MARKDOWN).read_text(encoding="utf-8"):
        raise BadInput(f"{folder / CARD_JSON}, {CARD_MARKDOWN} and {EDGE_FILE} do not say the same; {_AGAIN}")


def _require(path: Path) -> None:
    if not path.is_file():
        raise StageMissing(f"{path} is not there; {_AGAIN}")


def _entry(student: str, name: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(f"{student}/{name}")
    entry.size, entry.mode, entry.mtime = size_bytes, 0o644, 0
    return entry
