"""Card, bundle and the program in it: what is told is what is there, and every way of being broken is named."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from pydantic import ValidationError

from distill.cli.main import run_command
from distill.crops import center_crop, decode_image
from distill.errors import BadInput, StageMissing
from distill.teacher_info import Preprocessing
from export.bundle import make_bundle
from export.bundle_check import check_bundle, is_safe
from export.card import ImageSet, StudentCard, limits_of
from export.edge import EdgeFile, StudentInfo, UnmeasuredFile, read_edge_report
from export.files import sha256_of
from export.standalone import PROGRAM

Entry = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def student(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported student, with its card."""
    folder = tmp_path / "tiny"
    shutil.copytree(exported, folder)
    card_for(folder).write(folder)
    return folder


def card_for(folder: Path) -> StudentCard:
    edge = read_edge_report(folder)
    return StudentCard(
        name="tiny", num_parameters=5237, data=(ImageSet(used_for="training", path="photos|<b>", num_images=64, content_digest="d" * 64),),
        teacher={"name": "big", "fingerprint": "f" * 64, "precision": "fp32", "top1": None}, recipe={"temperature": 2.0, "epochs": 8},
        numbers=None, edge=edge, limits=limits_of(edge, None),
    )  # fmt: skip


@pytest.fixture
def archive(student: Path) -> Path:
    path = student.parent / "out" / "tiny.tar"
    make_bundle(student, path)
    return path


def entries(archive: Path) -> list[Entry]:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]


def rewrite(archive: Path, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """The same archive with other members, and without the checksum beside it."""
    changed = change(entries(archive))
    archive.with_name(archive.name + ".sha256").unlink(missing_ok=True)
    with tarfile.open(archive, "w") as tar:
        for member, content in changed:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_the_same_student_gives_the_same_bytes_and_nothing_of_this_machine(student: Path, archive: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    for path in student.rglob("*"):
        path.touch()
    make_bundle(student, again)
    assert again.read_bytes() == archive.read_bytes()
    members = [member for member, _ in entries(archive)]
    assert members[0].name == "tiny/manifest.json"
    assert [m.name for m in members[1:]] == sorted(m.name for m in members[1:])
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert {m.name.removeprefix("tiny/") for m in members} == {
        "manifest.json", "card.json", "card.md", "edge.json", "parity.json", "run_student.py",
        "tiny.fp32.onnx", "tiny.fp16.onnx", "tiny.int8.onnx",
    }  # fmt: skip
    line = archive.with_name("tiny.tar.sha256").read_text()
    assert line == f"{sha256_of(archive)}  tiny.tar\n"
    manifest = json.loads(entries(archive)[0][1])
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        member.name.removeprefix("tiny/"): sha256_of(student / member.name.removeprefix("tiny/")) for member in members[1:]
    }


def test_a_whole_bundle_is_whole_packed_and_unpacked(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bundle", "verify", str(archive)]) == 0
    assert capsys.readouterr().out == f"{archive}: whole, 8 files of student tiny\n"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert check_bundle(tmp_path / "unpacked" / "tiny").problems == []


def test_each_file_that_is_missing_altered_extra_or_short_is_named(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(found: list[Entry]) -> list[Entry]:
        kept = [(member, content) for member, content in found if member.name != "tiny/card.md"]
        changed = []
        for member, content in kept:
            if member.name == "tiny/edge.json":
                content = content.replace(b"0", b"1", 1)
            if member.name == "tiny/tiny.int8.onnx":
                content = content[:1000]
            changed.append((member, content))
        extra = tarfile.TarInfo("tiny/more/notes.txt")
        return [*changed, (extra, b"hello"), changed[-1]]

    rewrite(archive, change)
    assert run_command(["bundle", "verify", str(archive)]) == 2
    out, err = capsys.readouterr()
    said = [line.removeprefix(f"{archive}: ") for line in out.splitlines()]
    assert len(said) == 5
    assert said[0] == "extra tiny.int8.onnx (a second one)"
    assert said[1] == "missing card.md"
    assert said[2].startswith("altered edge.json: SHA-256 ")
    assert said[3].startswith("truncated tiny.int8.onnx: 1000 of ")
    assert said[4] == "extra more/notes.txt"
    assert err == f"distill: not whole: {archive} (5); get it again from where it was made\n"


def test_an_archive_that_was_cut_off_names_what_is_short_and_what_is_gone(archive: Path) -> None:
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        at = {member.name: member.offset_data for member in tar.getmembers()}
    archive.write_bytes(whole[: at["tiny/tiny.fp16.onnx"] + 700])
    problems = check_bundle(archive).problems
    assert problems[0].startswith("altered archive: SHA-256 ")
    assert "truncated archive: unexpected end of data" in problems
    assert any(problem.startswith("truncated tiny.fp16.onnx: 700 of ") for problem in problems)
    assert "missing tiny.fp32.onnx" in problems
    assert "missing tiny.int8.onnx" in problems
    for length in range(0, len(whole), 1531):  # wherever it is cut, it is never called whole
        archive.write_bytes(whole[:length])
        try:
            problems = check_bundle(archive).problems
        except BadInput as error:
            problems = [str(error)]
        assert problems


def test_an_archive_without_its_end_is_cut_short(archive: Path) -> None:
    archive.with_name("tiny.tar.sha256").unlink()
    whole = archive.read_bytes()
    end = max(member.offset_data + -(-member.size // 512) * 512 for member, _ in entries(archive))
    for length in (end, end + 512, end + 1023):
        archive.write_bytes(whole[:length])
        assert check_bundle(archive).problems == ["truncated archive: it has no end"]
    archive.write_bytes(whole[: end + 1024])
    assert check_bundle(archive).problems == []


@pytest.mark.parametrize("name", ["tiny/console", "tiny/auxiliary.onnx", "tiny/com10", "tiny/.hidden", "tiny/a b"])
def test_ordinary_names_are_safe(name: str) -> None:
    assert is_safe(name)


def test_any_byte_that_changes_is_noticed(archive: Path) -> None:
    archive.with_name("tiny.tar.sha256").unlink()
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        content = [(member.offset_data, member.size) for member in tar.getmembers()]
    random = np.random.default_rng(0)
    for start, size in content:
        at = start + int(random.integers(size))
        changed = bytearray(whole)
        changed[at] ^= 4
        archive.write_bytes(changed)
        assert check_bundle(archive).problems, at
    archive.write_bytes(whole + b"stowaway")
    assert check_bundle(archive).problems == ["extra bytes behind the end of the archive"]


def test_a_second_archive_far_behind_the_first_is_noticed(archive: Path) -> None:
    archive.with_name("tiny.tar.sha256").unlink()
    whole = archive.read_bytes()
    archive.write_bytes(whole + bytes(2**21))
    assert check_bundle(archive).problems == []  # zeros are padding
    archive.write_bytes(whole + bytes(2**21) + whole)
    assert check_bundle(archive).problems == ["extra bytes behind the end of the archive"]


def test_thousands_of_headers_before_one_file_are_one_line(archive: Path, tmp_path: Path) -> None:
    member = tarfile.TarInfo("tiny/" + "é" * 60)
    header = member.tobuf(tarfile.PAX_FORMAT)[:-512]  # without that of the file itself
    many = tmp_path / "many.tar"
    many.write_bytes(header * 3000 + archive.read_bytes())
    with pytest.raises(BadInput, match=r"many\.tar is no bundle"):
        check_bundle(many)


def with_manifest(archive: Path, **changes: object) -> None:
    def change(found: list[Entry]) -> list[Entry]:
        (member, content), *others = found
        manifest = {**json.loads(content), **changes}
        kept = [(m, c) for m, c in others if m.name.removeprefix("tiny/") in manifest["files"]]
        return [(member, json.dumps(manifest).encode()), *kept]

    rewrite(archive, change)


def test_a_manifest_that_names_nothing_or_recommends_what_is_not_there_is_no_bundle(archive: Path) -> None:
    with_manifest(archive, recommended="tiny.fp8.onnx")
    assert check_bundle(archive).problems == ["missing 'tiny.fp8.onnx', which manifest.json recommends"]
    with_manifest(archive, files={})
    assert check_bundle(archive).problems == ["missing 'tiny.fp8.onnx', which manifest.json recommends"]


@pytest.mark.parametrize(
    ("name", "clashing"),
    [
        ("Card.MD", {"Card.MD", "card.md"}),
        ("card.md/notes", {"card.md"}),
        ("Manifest.json", {"Manifest.json", "manifest.json"}),
        ("caf\u00e9", {"caf\u00e9", "CAFE\u0301"}),
    ],
)
def test_names_that_cannot_lie_side_by_side_are_refused(archive: Path, name: str, clashing: set[str]) -> None:
    content = b"hello"
    manifest = json.loads(entries(archive)[0][1])
    added = [name, *(clashing - {*manifest["files"], "manifest.json", name})]
    record = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    with_manifest(archive, files={**manifest["files"], **dict.fromkeys(added, record)})
    with tarfile.open(archive, "a") as tar:
        for one in added:
            member = tarfile.TarInfo(f"tiny/{one}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert {problem.split("'")[1] for problem in check_bundle(archive).problems} == clashing


def test_a_set_uid_file_and_a_name_that_steers_a_terminal_are_refused(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    privileged, steering = tarfile.TarInfo("tiny/run"), tarfile.TarInfo("tiny/\x1b[2J\nwhole")
    privileged.mode = 0o4755
    rewrite(archive, lambda found: [*found, (privileged, b""), (steering, b"")])
    problems = check_bundle(archive).problems
    assert [problem.partition(";")[0] for problem in problems] == [
        "unsafe 'tiny/run' (mode 4755)",
        "unsafe 'tiny/\\x1b[2J\\nwhole' (a plain file)",
    ]
    assert run_command(["bundle", "verify", str(archive)]) == 2
    assert "\x1b" not in capsys.readouterr().out


def test_every_bundle_is_checked_though_one_is_gone(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone.tar"
    assert run_command(["bundle", "verify", str(gone), str(archive)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith(f"{gone} is not there")
    assert out.splitlines()[1] == f"{archive}: whole, 8 files of student tiny"
    assert err == f"distill: not whole: {gone} (unreadable); get it again from where it was made\n"


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("/etc/cron.d/evil", tarfile.REGTYPE, "unsafe '/etc/cron.d/evil' (a plain file)"),
        ("tiny/../../evil", tarfile.REGTYPE, "unsafe 'tiny/../../evil' (a plain file)"),
        ("tiny/link", tarfile.SYMTYPE, "unsafe 'tiny/link' (a link)"),
        ("tiny/hard", tarfile.LNKTYPE, "unsafe 'tiny/hard' (a link)"),
        ("tiny/pipe", tarfile.FIFOTYPE, "unsafe 'tiny/pipe' (no plain file)"),
        ("tiny/device", tarfile.BLKTYPE, "unsafe 'tiny/device' (no plain file)"),
        *(
            (f"tiny/{name}", tarfile.REGTYPE, f"unsafe 'tiny/{name}' (a plain file)")
            for name in ("a.", "a ", "CON", "nul.txt", "Lpt1 .b/c")
        ),
        ("other/file", tarfile.REGTYPE, "extra other/file (outside the student's folder)"),
    ],
)
def test_members_that_could_write_elsewhere_are_refused(archive: Path, name: str, kind: bytes, said: str) -> None:
    evil = tarfile.TarInfo(name)
    evil.type, evil.linkname = kind, "/etc/passwd"
    rewrite(archive, lambda found: [*found, (evil, b"")])
    problems = check_bundle(archive).problems
    assert len(problems) == 1
    assert problems[0].startswith(said)


def test_what_is_no_bundle_is_one_line(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bundle", "verify", str(tmp_path / "nothing.tar")]) == 2
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    assert run_command(["bundle", "verify", str(tmp_path / "noise.tar")]) == 2
    out, err = (lines.splitlines() for lines in capsys.readouterr())
    assert (len(out), len(err)) == (2, 2)
    assert "nothing.tar is not there" in out[0]
    assert "noise.tar is no bundle" in out[1]
    assert "noise.tar (unreadable)" in err[1]
    rewrite(archive, lambda found: found[1:])
    assert check_bundle(archive).problems == ["missing manifest.json"]
    deep = b"[" * 100_000
    rewritten = tarfile.TarInfo("tiny/manifest.json")
    with tarfile.open(archive, "w") as tar:
        rewritten.size = len(deep)
        tar.addfile(rewritten, io.BytesIO(deep))
    assert check_bundle(archive).problems[0].startswith("altered manifest.json: it cannot be read")


def test_a_student_whose_folder_windows_could_not_make_gets_no_bundle(student: Path, tmp_path: Path) -> None:
    report = read_edge_report(student)
    report.replace(student=report.student.replace(name="aux")).write(student)
    with pytest.raises(BadInput, match="student 'aux' has a name that not every system unpacks"):
        make_bundle(student, tmp_path / "never.tar")


def test_only_what_was_measured_goes_into_a_bundle(student: Path, tmp_path: Path) -> None:
    target = tmp_path / "never.tar"
    (student / "card.md").rename(tmp_path / "card.md")
    with pytest.raises(StageMissing, match=r"card\.md is not there"):
        make_bundle(student, target)
    (tmp_path / "card.md").rename(student / "card.md")
    model = onnx.load(student / "tiny.fp32.onnx")
    model.doc_string = "touched"
    onnx.save(model, student / "tiny.fp32.onnx")
    with pytest.raises(BadInput, match=r"tiny\.fp32\.onnx is not the file that was measured"):
        make_bundle(student, target)
    assert not target.exists()
    assert list(tmp_path.glob(".never*")) == []


def test_a_card_of_other_files_does_not_get_into_a_bundle(student: Path, tmp_path: Path) -> None:
    card = (student / "card.md").read_text()
    (student / "card.md").write_text(card.replace("tiny", "tinier"))
    with pytest.raises(BadInput, match=r"card\.json, card\.md and edge\.json do not say the same; run"):
        make_bundle(student, tmp_path / "never.tar")
    (student / "card.md").write_text(card)
    report = read_edge_report(student)
    report.replace(why="because").write(student)
    with pytest.raises(BadInput, match="do not say the same"):
        make_bundle(student, tmp_path / "never.tar")
    (student / "card.json").write_text("{}")
    with pytest.raises(BadInput, match=r"card\.json is no student card"):
        make_bundle(student, tmp_path / "never.tar")
    assert not list(tmp_path.glob("*never*"))


def test_a_file_that_says_int8_and_holds_float_does_not_get_into_a_bundle(student: Path, tmp_path: Path) -> None:
    """Even where edge.json vouches for it."""
    shutil.copyfile(student / "tiny.fp32.onnx", student / "tiny.int8.onnx")
    report = read_edge_report(student)
    lying = [
        f.replace(sha256=sha256_of(student / f.path), int8_weight_share=1.0) if f.kind == "int8" else f for f in report.files
    ]  # fmt: skip
    report.replace(files=lying).write(student)
    with pytest.raises(BadInput, match="says int8, but only 0% of its weights are"):
        make_bundle(student, tmp_path / "never.tar")


def test_the_card_says_what_was_measured_and_what_not(student: Path) -> None:
    card = StudentCard.model_validate_json((student / "card.json").read_bytes())
    assert card == card_for(student)
    page = (student / "card.md").read_text()
    for file in card.edge.files:
        assert file.sha256 in page
        assert f"{file.latency_p50_ms:.3f} / {file.latency_p99_ms:.3f}" in page
    assert "Not evaluated." in page
    assert "f" * 64 in page
    assert "photos\\|&lt;b>" in page  # a name stays one cell
    assert card.edge.machine in page
    assert any("only the agreement with the fp32 file is known" in limit for limit in card.limits)
    left = card.edge.files[0].replace(top1=0.8, num_images=400)
    labelled = card.edge.replace(
        files=(left, card.edge.files[2].replace(shipped=False, reason="not shipped: too slow")),
        not_measured=(UnmeasuredFile(path="tiny.mlpackage", files={}, size_bytes=1, reason="no Core ML here"),),
    )
    said = limits_of(labelled, {"scores": {}})
    assert any("standard error 2.0 points" in limit for limit in said)
    assert not any("more than the 1.0%" in limit for limit in said)
    few = limits_of(card.edge.replace(files=(left.replace(top1=1.0, num_images=16),)), None)
    assert any("standard error 6.7 points" in limit for limit in few)
    assert any("With 16 test crops one of them is 6.2%, more than the 1.0%" in limit for limit in few)
    assert "tiny.int8.onnx: not shipped: too slow." in said
    assert "tiny.mlpackage: not measured, no Core ML here." in said
    with pytest.raises(ValidationError):
        card.replace(limits=())


BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "distill", "export", "student_trainer", "teacher_server", "onnx", "pydantic"):
            raise ImportError(f"{name} is not on the device")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_the_device(program: Path, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", BLOCKED, str(program), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("case", ["square", "landscape", "portrait", "transparent", "grey", "16-bit", "turned", "cmyk", "cmyk of Adobe"])
def test_the_program_in_the_bundle_gives_our_logits_with_onnxruntime_alone(student: Path, tmp_path: Path, case: str) -> None:
    random = np.random.default_rng(3)
    height, width = {"square": (16, 16), "landscape": (40, 67), "portrait": (67, 40)}.get(case, (33, 50))
    pixels = np.clip(random.normal(120, 30, (height, width, 4)) + 60 * np.linspace(-1, 1, width)[None, :, None], 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels if case == "transparent" else pixels[..., 0] if case == "grey" else pixels[..., :3])
    exif = Image.Exif()
    if case == "turned":
        exif[0x0112] = 6
    path = tmp_path / "image.png"
    if case == "16-bit":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8 | 0x7F)
    if case.startswith("cmyk"):
        path = path.with_suffix(".jpg")
        image = Image.fromarray(pixels, "CMYK")
    image.save(path, exif=exif)
    if case == "cmyk":
        marker = path.read_bytes()
        start = marker.index(b"\xff\xee")
        path.write_bytes(marker[:start] + marker[start + 2 + int.from_bytes(marker[start + 2 : start + 4]) :])
    report = read_edge_report(student)
    model = student / report.recommended
    ratio = report.student.preprocessing.crop_ratio
    crop = center_crop(decode_image(path.read_bytes()), 16, ratio)
    expected = ort.InferenceSession(model).run(["logits"], {"images": crop[None]})[0][0]
    answer = json.loads(on_the_device(student / "run_student.py", str(model), str(path), "--json"))
    assert np.allclose(answer["logits"], expected, atol=1e-5)
    assert tuple(answer["class_names"]) == report.student.class_names
    assert sum(answer["probs"]) == pytest.approx(1.0)
    lines = on_the_device(student / "run_student.py", str(model), str(path), "--top", "2").splitlines()
    assert len(lines) == 2
    best = int(np.argmax(expected))
    assert lines[0].split() == [f"{answer['probs'][best]:.2%}", report.student.class_names[best]]


@pytest.mark.parametrize(
    "how",
    [
        Preprocessing(image_size=16, crop_ratio=0.875),
        Preprocessing(image_size=16, crop_ratio=0.6),
        Preprocessing(image_size=16, crop_ratio=0.6, interpolation="bicubic"),
    ],
)
def test_the_program_cuts_the_crop_that_training_was_evaluated_on(student: Path, tmp_path: Path, how: Preprocessing) -> None:
    """Byte for byte, with a margin around the crop: the metadata says how wide, and which filter."""
    info = StudentInfo(name="tiny", class_names=("a", "b"), preprocessing=how)
    model = onnx.load(student / "tiny.fp32.onnx")
    onnx.helper.set_model_props(model, {"distill.student": info.model_dump_json()})
    onnx.save(model, tmp_path / "model.onnx")
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)).save(path)
    crop = how.evaluation_crop(decode_image(path.read_bytes()))
    expected = ort.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"images": crop[None]})[0][0]
    answer = json.loads(on_the_device(student / "run_student.py", str(tmp_path / "model.onnx"), str(path), "--json"))
    assert answer["logits"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_program_takes_formats_that_training_does_not(student: Path, tmp_path: Path) -> None:
    """Only a JPEG has its CMYK stored the other way round."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8), "CMYK")
    image.save(tmp_path / "image.tiff")
    image.convert("RGB").save(tmp_path / "image.png")
    program, model = student / "run_student.py", str(student / "tiny.fp32.onnx")
    tiff, same = (json.loads(on_the_device(program, model, str(tmp_path / f"image.{kind}"), "--json")) for kind in ("tiff", "png"))
    assert tiff["logits"] == same["logits"]


def test_the_program_refuses_a_file_of_no_runtime(student: Path) -> None:
    done = subprocess.run([sys.executable, str(student / PROGRAM), "card.md", "x.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "card.md is none of .onnx, .xml, .pte" in done.stderr


def test_a_bundle_is_checked_without_torch_and_onnx() -> None:
    code = "import export.bundle_check, distill.cli.bundle, sys; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_bundled_file_is_the_recommended_one(archive: Path, student: Path) -> None:
    manifest = json.loads(entries(archive)[0][1])
    recommended: list[EdgeFile] = [file for file in read_edge_report(student).files if file.path == manifest["recommended"]]
    assert len(recommended) == 1
    assert manifest["recommended"] in manifest["files"]
