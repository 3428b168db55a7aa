"""`distill repository` and `distill tune` as a user types them: what they say, exit codes, and how they find the running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from distill.cli import tuning
from distill.cli.ensemble import member_word
from distill.cli.main import run_command
from distill.cli.serving_record import RECORD, announced, read_record, running_service, this_service
from distill.cli.tuning import settings_for, tune_teacher
from distill.cli.tuning_file import Tuning, tuned_settings, write_tuning
from distill.config import validate
from distill.errors import ConfigError
from export.fingerprint import read_teacher_info, stamp_teacher
from export.repository_versions import active_version, add_version
from export.settings import RepositorySettings, TeacherExportSettings
from teacher_server.settings import ServerSettings
from teacher_server.tuning import Candidate, Measured


@pytest.fixture
def teachers(tiny_teacher: Any, tmp_path: Path) -> list[Path]:
    """Two stamped teachers named `tiny`, of different weights."""
    made = []
    for seed in (1, 2):
        model = onnx.load(tiny_teacher.repository / "tiny" / "1" / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name == "weight":
                values = np.random.default_rng(seed).normal(0, 4, (3, 10)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, "weight"))
        path = tmp_path / f"teacher_{seed}" / "model.onnx"
        path.parent.mkdir()
        onnx.save(model, path)
        stamp_teacher(path, name="tiny", class_names=tiny_teacher.info.class_names, preprocessing=tiny_teacher.info.preprocessing)
        made.append(path.parent)
    return made


@pytest.fixture
def where(tmp_path: Path) -> tuple[str, str]:
    return ("--repository", str(tmp_path / "run" / "model_repository"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_add_list_activate_remove(teachers: list[Path], where: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (read_teacher_info(folder / "model.onnx").fingerprint for folder in teachers)
    assert run_command(["repository", "add", str(teachers[0]), *where]) == 0
    assert "added version 1 of tiny" in said(capsys)
    assert run_command(["repository", "add", str(teachers[1] / "model.onnx"), *where]) == 0
    assert "to serve it: distill repository activate tiny 2" in said(capsys)
    assert run_command(["repository", "list", "--json", *where]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["served"], row["fingerprint"]) for row in rows] == [(1, True, first), (2, False, second)]
    assert run_command(["repository", "activate", "tiny", "2", *where]) == 0
    assert "the next one that is started serves it" in said(capsys)
    assert run_command(["repository", "remove", "tiny", "1", *where]) == 0
    assert run_command(["repository", "list", *where]) == 0
    table = said(capsys)
    assert second[:12] in table
    assert first[:12] not in table
    assert run_command(["repository", "add", str(teachers[0]), "--activate", *where]) == 0
    assert "version 3 of tiny is the served one" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["activate", "tiny", "7"], "tiny has no version 7; it has 1"),
        (["activate", "cat", "1"], "has no model 'cat'; it has tiny"),
        (["activate", "tiny", "0"], "0 is not in the range x>=1"),
        (["activate", "tiny", "two"], "'two' is not a valid integer"),
        (["remove", "tiny", "1"], "version 1 of tiny is the served one: add another version first"),
        (["add", "nothing/here"], "nothing/here does not exist"),
        (["add", "TEACHER", "--name", "../x"], "'../x' cannot name a model"),
        (["add", "TEACHER"], "already, as version 1"),
        (["list", "run_dir=x"], "'run_dir=x' overrides the run file, but --repository names the folder itself"),
        (["ensemble", "both", "--out", "OUT", "--member", "TEACHER"], "at least two members, 1 given"),
        (["ensemble", "both", "--out", "OUT", "--member", "TEACHER:much"], "'much' is no weight"),
        (["ensemble", "both", "--out", "OUT", "--member", "TEACHER", "--member", "OTHER", "--crop-ratio", "5"], "crop_ratio"),
        (["ensemble", "bo th", "--out", "OUT", "--member", "TEACHER", "--member", "TEACHER"], "name"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], words: str, teachers: list[Path], where: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(["repository", "add", str(teachers[0]), *where])
    capsys.readouterr()
    places = {"TEACHER": str(teachers[0]), "OTHER": str(teachers[1]), "OUT": str(tmp_path / "out")}
    words_of = [part.replace("TEACHER", places["TEACHER"]) if part.startswith("TEACHER") else places.get(part, part) for part in arguments]
    assert run_command(["repository", *words_of, *where]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert words in captured.err
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_we_never_write_is_named(
    teachers: list[Path], where: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in teachers:
        run_command(["repository", "add", str(folder), *where])
    config = tmp_path / "run" / "model_repository" / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 256", "max_batch_size: 5000"))
    capsys.readouterr()
    assert run_command(["repository", "activate", "tiny", "2", *where]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert "config.pbtxt of 'tiny': max_batch_size" in captured.err


def test_a_version_without_a_label_is_not_activated_where_no_triton_can_be_asked(
    teachers: list[Path], where: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = teachers[1] / "model.onnx"
    info, model = read_teacher_info(path), onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), "bias"))
    onnx.save(model, path)
    stamp_teacher(path, name="tiny", class_names=info.class_names, preprocessing=info.preprocessing)
    for folder in teachers:
        assert run_command(["repository", "add", str(folder), *where]) == 0
    capsys.readouterr()
    assert run_command(["repository", "activate", "tiny", "2", *where]) == 2
    assert "gives no label: NaN" in said(capsys)
    assert active_version(tmp_path / "run" / "model_repository", "tiny") == 1


@pytest.mark.parametrize("words", [["--max-p99-ms", "inf"], ["--max-p99-ms", "nan"], ["--minutes", "inf"], ["--minutes", "nan"]])
def test_a_tuning_without_an_end_is_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tune", *words]) == 2
    captured = capsys.readouterr()
    assert f"Invalid value for '{words[0]}'" in captured.err


def test_an_ensemble_with_images_of_its_own_needs_no_run_file(
    teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(tmp_path / "photos" / "1.png")
    arguments = ["ensemble", "both", "--out", "out", *(word for folder in teachers for word in ("--member", str(folder)))]
    assert run_command(["repository", *arguments]) == 2
    assert "run file recipes/quickstart.yaml does not exist" in said(capsys)
    assert run_command(["repository", *arguments, "--images", "photos"]) == 0, said(capsys)
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_the_repository_of_a_run_file(teachers: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["repository", "add", str(teachers[0]), f"run_dir={tmp_path / 'here'}"]) == 0
    assert (tmp_path / "here" / "model_repository" / "tiny" / "1" / "model.onnx").is_file()
    assert run_command(["repository", "list", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "does not exist; give one with --config" in said(capsys)


def test_an_ensemble_goes_into_the_repository(
    teachers: list[Path], where: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    out = tmp_path / "both"
    arguments = [
        "ensemble",
        "both",
        "--out",
        str(out),
        "--member",
        f"{teachers[0]}:3",
        "--member",
        str(teachers[1]),
        "--images",
        str(photos),
    ]
    assert run_command(["repository", *arguments, "--add", *where]) == 0, said(capsys)
    assert "0.750 x tiny" in said(capsys)
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["members.json", "model.onnx", "parity.json"]
    assert run_command(["repository", "list", "--json", *where]) == 0
    assert [(row["model"], row["version"], row["served"]) for row in json.loads(capsys.readouterr().out)] == [("both", 1, True)]
    assert run_command(["repository", *arguments, *where]) == 2
    assert "is not empty; choose another" in said(capsys)


def test_member_words(tmp_path: Path) -> None:
    assert member_word("a/b") == (Path("a/b"), 1.0)
    assert member_word("a/b:0.5") == (Path("a/b"), 0.5)
    (tmp_path / "with:2").mkdir()
    assert member_word(f"{tmp_path}/with:2") == (tmp_path / "with:2", 1.0)
    assert member_word(f"{tmp_path}/with:2:3") == (tmp_path / "with:2", 3.0)
    with pytest.raises(ConfigError, match="'x' is no weight"):
        member_word("a:x")


def served(*, log_path: Path | None, url: str | None = "h:1") -> Any:
    return SimpleNamespace(address=SimpleNamespace(model="tiny"), triton_url=url, log_path=log_path)


class TestServingRecord:
    def test_is_there_for_as_long_as_the_service(self, tmp_path: Path) -> None:
        repository = tmp_path / "model_repository"
        record = this_service(served(log_path=tmp_path / "log"), repository, "http://h:2")
        with announced(tmp_path, record):
            assert running_service(repository) == record
            assert (record.triton_url, record.gateway_url, record.pid) == ("h:1", "http://h:2", os.getpid())
            assert running_service(tmp_path / "another_repository") is None
        assert running_service(repository) is None
        assert not (tmp_path / RECORD).exists()

    def test_a_triton_elsewhere_is_not_ours_to_change(self, tmp_path: Path) -> None:
        assert this_service(served(log_path=None), tmp_path, "http://h:2").triton_url is None

    def test_of_a_process_that_is_gone_counts_for_nothing(self, tmp_path: Path) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        record = this_service(served(log_path=tmp_path), tmp_path / "model_repository", "http://h:2")
        (tmp_path / RECORD).write_text(record.model_copy(update={"pid": gone.pid}).model_dump_json())
        assert running_service(tmp_path / "model_repository") is None

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not say when a process was started")
    def test_of_an_earlier_process_with_the_same_id_counts_for_nothing(self, tmp_path: Path) -> None:
        record = this_service(served(log_path=tmp_path), tmp_path / "model_repository", "http://h:2")
        (tmp_path / RECORD).write_text(record.replace(process_start="1").model_dump_json())
        assert running_service(tmp_path / "model_repository") is None
        (tmp_path / RECORD).write_text(record.model_dump_json())
        assert running_service(tmp_path / "model_repository") == record

    def test_a_later_service_keeps_its_own(self, tmp_path: Path) -> None:
        record = this_service(served(log_path=tmp_path), tmp_path / "model_repository", "http://h:2")
        with announced(tmp_path, record):
            (tmp_path / RECORD).write_text(record.replace(pid=1, process_start=None).model_dump_json())
        assert (tmp_path / RECORD).exists()

    def test_a_damaged_file_counts_for_nothing(self, tmp_path: Path) -> None:
        (tmp_path / RECORD).write_text("{")
        assert read_record(tmp_path) is None
        assert running_service(tmp_path / "model_repository") is None


CHOSEN = {"preferred_batch_sizes": [16], "instance_count": 2, "intra_op_threads": 4, "max_queue_size": 700, "warmup_batch_sizes": [1, 16]}


class TestTuning:
    MEASURED = "f" * 64

    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("teacher_server.tuning.usable_cores", lambda: 8)

    def tuning(self, model: str = "teacher", **chosen: Any) -> Tuning:
        return Tuning(model=model, fingerprint=self.MEASURED, max_p99_ms=100, num_cores=8, chosen={**CHOSEN, **chosen}, table=[])

    def test_a_run_takes_what_was_tuned_where_its_file_leaves_it_open(self, tmp_path: Path) -> None:
        mine = TeacherExportSettings(repository=RepositorySettings(instance_count=3, max_batch_size=32))
        assert tuned_settings(mine, tmp_path, self.MEASURED) == mine
        write_tuning(tmp_path, self.tuning())
        taken = tuned_settings(mine, tmp_path, self.MEASURED).repository
        assert (taken.preferred_batch_sizes, taken.intra_op_threads, taken.max_queue_size) == ((16,), 4, 700)
        assert taken.instance_count == 3, "the run file says so"
        assert taken.max_batch_size == 32
        assert tuned_settings(mine.replace(name="another"), tmp_path, self.MEASURED) == mine.replace(name="another")

    def test_what_the_run_file_says_wins_be_it_the_default(self, tmp_path: Path) -> None:
        write_tuning(tmp_path, self.tuning())
        given = validate(TeacherExportSettings, {"repository": {"instance_count": 1}}, "run.yaml")
        taken = tuned_settings(given.replace(name="teacher"), tmp_path, self.MEASURED).repository
        assert (taken.instance_count, taken.intra_op_threads) == (1, 4)

    @pytest.mark.parametrize(("fingerprint", "cores"), [("e" * 64, 8), (MEASURED, 4)])
    def test_a_tuning_of_another_teacher_or_machine_is_not_used_and_said_so(
        self, fingerprint: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("teacher_server.tuning.usable_cores", lambda: cores)
        write_tuning(tmp_path, self.tuning())
        assert tuned_settings(TeacherExportSettings(), tmp_path, fingerprint) == TeacherExportSettings()
        assert f"teacher ffffffffffff on 8 core(s), this is {fingerprint[:12]} on {cores}" in said(capsys)

    @pytest.mark.parametrize("text", ["{", "[]", '{"model": "teacher"}'])
    def test_a_damaged_file_is_named(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "tuning.json").write_text(text)
        with pytest.raises(ConfigError, match=r"tuning\.json"):
            tuned_settings(TeacherExportSettings(), tmp_path, self.MEASURED)
        write_tuning(tmp_path, self.tuning(instance_count=0))
        with pytest.raises(ConfigError, match=r"tuning\.json: instance_count"):
            tuned_settings(TeacherExportSettings(), tmp_path, self.MEASURED)

    def test_what_triton_is_told_for_a_candidate(self) -> None:
        base = RepositorySettings(max_batch_size=64, queue_timeout_us=5, max_queue_delay_us=2000)
        told = settings_for(Candidate(16, 2, 4), base, max_p99_ms=20, images_per_s=1e6)
        assert (told.preferred_batch_sizes, told.instance_count, told.intra_op_threads, told.warmup_batch_sizes) == ((16,), 2, 4, (1, 16))
        assert told.max_queue_delay_us == 1000, "a twentieth of the limit"
        assert told.max_queue_size == 4096
        assert (told.max_batch_size, told.queue_timeout_us) == (64, 5)
        alone = settings_for(Candidate(1, 1, 1), base, max_p99_ms=1000, images_per_s=1)
        assert (alone.max_queue_delay_us, alone.max_queue_size, alone.warmup_batch_sizes) == (0, 1, (1,))
        assert settings_for(Candidate(16, 2, 4), base, 500, 100).max_queue_size == 50, "what is answered within the limit, and not more"
        assert settings_for(Candidate(16, 2, 4), base, 500).max_queue_size == 512, "while it is measured, nothing is refused"

    def test_the_choice_is_written_and_what_keeps_no_limit_is_refused(
        self, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        repository = tmp_path / "run" / "model_repository"
        add_version(repository, teachers[0], RepositorySettings())
        config = repository / "tiny" / "config.pbtxt"
        before = config.read_bytes()
        teacher = TeacherExportSettings(name="tiny")
        table = [
            Measured(batch_size=8, instance_count=1, intra_op_threads=2, num_rounds=3, images_per_s=100, p50_ms=9, p99_ms=20),
            Measured(batch_size=64, instance_count=2, intra_op_threads=1, num_rounds=3, images_per_s=300, p50_ms=90, p99_ms=120),
            Measured(batch_size=256, instance_count=2, intra_op_threads=1, num_rounds=0, note="batch 64 takes too long already"),
        ]
        monkeypatch.setattr(tuning, "_measure", lambda *_: table)
        with pytest.raises(ConfigError, match=r"nothing keeps p99 within 10 ms; the quickest was batch 8 with 20\.0 ms"):
            tune_teacher(repository, teacher, ServerSettings(), 10, 1)
        assert config.read_bytes() == before
        assert not (tmp_path / "run" / "tuning.json").exists()
        assert "over the limit" in capsys.readouterr().out
        chosen = tune_teacher(repository, teacher, ServerSettings(), 150, 1)
        fingerprint = read_teacher_info(teachers[0] / "model.onnx").fingerprint
        assert chosen == tuned_settings(teacher, tmp_path / "run", fingerprint).repository
        assert (chosen.preferred_batch_sizes, chosen.instance_count, chosen.intra_op_threads) == ((64,), 2, 1)
        assert "preferred_batch_size: 64" in config.read_text()
        kept = json.loads((tmp_path / "run" / "tuning.json").read_text())
        assert [Measured.model_validate(row) for row in kept["table"]] == table
        capsys.readouterr()
        mine = teacher.replace(repository=RepositorySettings(instance_count=3))
        assert tune_teacher(repository, mine, ServerSettings(), 150, 1) == chosen
        assert "the run file sets teacher.repository.instance_count, which wins at the next export" in capsys.readouterr().out
        assert tuned_settings(mine, tmp_path / "run", fingerprint).repository == chosen.replace(instance_count=3)
        kept_files = config.read_bytes(), (tmp_path / "run" / "tuning.json").read_bytes()
        table[2] = table[2].replace(note="not reached in the time")
        with pytest.raises(ConfigError, match=r"--minutes 1 did not do .* nothing written; .* give --minutes \d+$") as caught:
            tune_teacher(repository, teacher, ServerSettings(), 150, 60)
        assert caught.value.exit_code == 2
        assert "chosen" not in said(capsys)
        table[:] = [table[2].replace(note="failed: out of memory")]
        with pytest.raises(ConfigError, match="nothing could be measured: failed: out of memory"):
            tune_teacher(repository, teacher, ServerSettings(), 150, 1)
        assert kept_files == (config.read_bytes(), (tmp_path / "run" / "tuning.json").read_bytes())

    def test_a_run_that_is_being_served_is_not_measured(self, tmp_path: Path) -> None:
        repository = tmp_path / "model_repository"
        with announced(tmp_path, this_service(served(log_path=tmp_path), repository, "http://h:2")):
            with pytest.raises(ConfigError, match="stop it first"):
                tune_teacher(repository, TeacherExportSettings(name="tiny"), ServerSettings(), 100, 1)
