"""The chain of stages: what each depends on, and what a run says when a stage that it needs is not there.

The images are never decoded and nothing is trained: a finished stage is its record, a checkpoint one small tensor.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import save_checkpoint
from distill.cli import verbs
from distill.cli.quickstart import result_table
from distill.cli.run import Run
from distill.cli.run_file import RunFile
from distill.config import validate, with_overrides
from distill.errors import CheckpointError, ConfigError, DistillError, SourceError, StageMissing
from distill.models.classifier import build_classifier
from distill.models.saved_classifier import ClassifierCard, save_classifier
from distill.models.settings import NetworkSettings
from distill.stages import Stage
from distill.teacher_info import Preprocessing
from student_trainer.store import SoftLabelStore
from teacher_server.address import TeacherAddress

NETWORK = {"name": "resnet", "depth": 10, "width_multiplier": 0.125, "stem": "cifar"}
TEACHER = NetworkSettings(depth=18, width_multiplier=0.25, stem="cifar")
SWEEP = {"grid": {"optimizer.learning_rate": [0.1, 0.2]}}
ADDRESS = TeacherAddress(model="teacher", repository="nowhere")
FROM_SELF_DISTILLING_ON = {"self-distill", "export-self-distilled", "sweep", "train", "evaluate", "export-student"}
FROM_FINETUNING_ON = {"finetune", "export-teacher", *FROM_SELF_DISTILLING_ON}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 cats and 4 dogs."""
    folder = tmp_path_factory.mktemp("images")
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(file, "PNG")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(4):
            (folder / name / f"{number}.png").write_bytes(file.getvalue())
    return folder


@pytest.fixture
def tree(images: Path, tmp_path: Path) -> dict[str, Any]:
    """A run file: the whole chain, one student."""
    data = {name: {"path": str(images)} for name in ("unlabelled", "labelled", "test")}
    train = {"students": [{"name": "small", "network": NETWORK}]}
    return {"run_dir": str(tmp_path / "run"), "data": {**data, "image_size": 8}, "self_distill": {}, "train": train, "sweep": SWEEP}


def run_of(tree: dict[str, Any], *overrides: str) -> Run:
    copied = RunFile.model_validate(tree).model_dump(mode="json", by_alias=True)
    return Run(validate(RunFile, with_overrides(copied, list(overrides)), "run.yaml"))


def stages_of(run: Run) -> dict[str, str]:
    """Name -> digest."""
    stages = [*run.teachers, *([run.sweep] if run.file.sweep else []), run.train, run.control, run.evaluate, run.edge]
    return {stage.name: stage.digest for stage in stages}


def pretrained_checkpoint(folder: Path, network: NetworkSettings = TEACHER) -> Path:
    weights = {"backbone.weight": torch.zeros(1), "head.layers.0.weight": torch.zeros(1)}
    manifest = {"kind": "pretrained", "network": network.model_dump(mode="json"), "preprocessing": {"image_size": 8}}
    save_checkpoint(folder, weights, manifest)
    return folder


def finish(stage: Stage, **result: Any) -> None:
    stage.begin()
    stage.finish(result)


class TestWhatAStageDependsOn:
    @pytest.mark.parametrize(
        ("override", "changed"),
        [
            ("pretrain.epochs=7", {"pretrain", *FROM_FINETUNING_ON}),
            ("data.std=[0.5,0.5,0.5]", {"pretrain", "control", *FROM_FINETUNING_ON}),
            ("data.crop_ratio=0.5", {"control", *FROM_FINETUNING_ON}),  # not of pretraining, which evaluates nothing
            ("data.interpolation=bicubic", {"control", *FROM_FINETUNING_ON}),
            ("data.label_fraction=0.5", {"control", *FROM_FINETUNING_ON}),
            ("data.class_names=[dog,cat]", {"control", *FROM_FINETUNING_ON}),
            ("finetune.linear=true", FROM_FINETUNING_ON),
            ("teacher.opset=19", {"export-teacher", *FROM_SELF_DISTILLING_ON}),
            ("ray.num_workers=2", set()),
            ("sweep.epochs=3", {"sweep"}),
            ("sweep.halving.eta=2", {"sweep"}),
            ("train.students.0.ema_decay=0.9", {"sweep", "train", "control", "evaluate", "export-student"}),
            ("train.weighting=entropy", {"sweep", "train", "evaluate", "export-student"}),
            ("train.compile_backend=inductor", set()),
            ("train.mixing_cache_mib=7", set()),
            ("train.held_out_images=7", {"sweep"}),
            ("train.mixing={kind: cutmix}", {"sweep", "train", "evaluate", "export-student"}),
            ("train.crops_per_decode=2", {"sweep", "train", "evaluate", "export-student"}),
            ("train.halving={eta: 2}", {"train", "evaluate", "export-student"}),
            ("train.early_stop={patience: 3}", {"sweep", "train", "evaluate", "export-student"}),
            ("store.max_tv=0.1", FROM_SELF_DISTILLING_ON),
            ("self_distill.temperature=0.5", FROM_SELF_DISTILLING_ON),
            ("train.epochs=7", {"sweep", "train", "control", "evaluate", "export-student"}),
            ("train.students.0.network.depth=14", {"sweep", "train", "control", "evaluate", "export-student"}),
            ("train.temperature=4", {"sweep", "train", "evaluate", "export-student"}),
            ("train.alpha=0.5", {"sweep", "train", "evaluate", "export-student"}),
            ("train.num_views=3", {"sweep", "train", "evaluate", "export-student"}),
            ("train.control=false", {"evaluate"}),
            ("edge.int8=false", {"export-student"}),
            ("train.num_evaluations=2", set()),
            ("train.requests_in_flight=2", set()),
            ("pretrain.checkpoint_every_s=5", set()),
            ("pretrain.checkpoint_blocks=true", set()),
            ("finetune.checkpoint_every_s=5", set()),
            ("data.num_threads=5", set()),
            ("data.max_rejected_share=0.5", set()),
            ("server.backend=embedded", set()),
        ],
    )
    def test_a_setting_makes_its_own_stages_anew(self, tree: dict[str, Any], override: str, changed: set[str]) -> None:
        before, after = stages_of(run_of(tree)), stages_of(run_of(tree, override))
        assert set(before) == set(Run.STAGES) - {"import"}
        assert {name for name in before if before[name] != after[name]} == changed

    def test_evaluations_and_held_out_images_where_early_stop_looks_at_them(self, tree: dict[str, Any]) -> None:
        stopping = "train.early_stop={patience: 3}"
        before = stages_of(run_of(tree, stopping))
        for override in ("train.num_evaluations=2", "train.held_out_images=7"):
            after = stages_of(run_of(tree, stopping, override))
            assert {name for name in before if before[name] != after[name]} == {"sweep", "train", "evaluate", "export-student"}

    def test_labels_that_are_learnt_from_beside_the_teachers(self, tree: dict[str, Any]) -> None:
        """Below alpha 1 the students' labels count, and not only by way of the teacher."""
        for overrides in (["train.alpha=0.5"], ["train.images=labelled"]):
            before, after = (run_of(tree, *overrides, f"data.label_fraction={share}").train.inputs for share in (1, 0.5))
            assert before["labelled"] != after["labelled"]
        assert "labelled" not in run_of(tree).train.inputs

    def test_weights_that_students_and_controls_start_from(self, tree: dict[str, Any], tmp_path: Path) -> None:
        folder = pretrained_checkpoint(tmp_path / "weights")
        found = []
        for depth in (18, 34):
            pretrained_checkpoint(folder, TEACHER.replace(depth=depth))
            found.append(stages_of(run_of(tree, f"train.students.0.initial_weights={folder}")))
        assert {name for name in found[0] if found[0][name] != found[1][name]} == {
            "sweep",
            "train",
            "control",
            "evaluate",
            "export-student",
        }

    def test_the_ids_in_a_list_and_not_its_comments(self, tree: dict[str, Any], tmp_path: Path) -> None:
        ids = tmp_path / "ids.txt"
        digests = []
        for text in ("cat/0.png\ndog/0.png\n", "# chosen by hand\ndog/0.png\ncat/0.png\n", "cat/1.png\ndog/0.png\n"):
            ids.write_text(text)
            digests.append(run_of(tree, f"data.labelled_ids={ids}").finetune.digest)
        assert digests[0] == digests[1] != digests[2]
        ids.unlink()
        with pytest.raises(SourceError, match=r"ids.txt cannot be read: No such file"):
            _ = run_of(tree, f"data.labelled_ids={ids}").finetune

    def test_an_import_on_the_classes_that_it_is_given(self, tree: dict[str, Any], tmp_path: Path) -> None:
        pretrained_checkpoint(tmp_path / "other" / "pretrained")
        given = ["import.kind=checkpoint", f"import.path={tmp_path / 'other'}"]
        before, after = run_of(tree, *given).imported, run_of(tree, *given, "data.class_names=[dog,cat]").imported
        assert before.digest != after.digest


class TestWhatIsNotThere:
    def test_the_verb_that_makes_it_is_named(self, tree: dict[str, Any]) -> None:
        run = run_of(tree)
        for stage, verb in ((run.second_teacher, "self-distill"), (run.control, "evaluate"), (run.train, "train")):
            with pytest.raises(StageMissing, match=rf"run `distill {verb}` with this run file first"):
                stage.require()
            finish(Stage(stage.run_dir, stage.name, {}, {}))
            with pytest.raises(StageMissing, match=rf"run `distill {verb}` again"):
                stage.require()

    @pytest.mark.parametrize("origin", ["pretrained", "finetuned"])
    def test_initial_weights_of_a_stage_that_is_not_finished(self, tree: dict[str, Any], origin: str) -> None:
        run = run_of(tree, f"train.students.0.initial_weights={origin}")
        with pytest.raises(StageMissing, match="run `distill"):
            _ = run.train
        assert not run.finished

    def test_initial_weights_that_nobody_makes(self, tree: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"student small: initial_weights nowhere: no checkpoint in nowhere; give random,"):
            _ = run_of(tree, "train.students.0.initial_weights=nowhere").train

    def test_a_teacher_whose_second_name_would_be_too_long(self, tree: dict[str, Any]) -> None:
        assert run_of(tree, f"teacher.name={'x' * 49}").second_name.name == f"{'x' * 49}-self-distilled"
        with pytest.raises(ConfigError, match=r"the self-distilled teacher: name: .*\{1,64\}"):
            _ = run_of(tree, f"teacher.name={'x' * 50}").second_name


class TestImports:
    """A run that begins with someone else's network."""

    @pytest.fixture
    def imported(self, tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
        pretrained_checkpoint(tmp_path / "other" / "pretrained")
        return {**tree, "import": {"kind": "checkpoint", "path": str(tmp_path / "other")}}

    def test_before_the_import_nobody_knows_what_it_brings(self, imported: dict[str, Any]) -> None:
        run = run_of(imported)
        assert [stage.name for stage in run.teachers] == ["import"]
        assert not run.finished

    def test_a_pretrained_network_is_fine_tuned_and_distilled_into_its_like(self, imported: dict[str, Any], tmp_path: Path) -> None:
        run = run_of(imported)
        assert verbs.import_teacher(run)["made"] == "pretrained"
        # Fine-tuning is not done; what lies in its folder is of another run, and of another network.
        stale = Stage(run.folder, "finetune", {}, {})
        finish(stale)
        save_checkpoint(stale.folder / "checkpoint", {"x": torch.zeros(1)}, {"kind": "classifier", "card": {}})
        assert run.self_training.students[0].network == run.backbone == TEACHER
        assert not run.finished
        names = [stage.name for stage in run.teachers]
        assert names == ["import", "finetune", "export-teacher", "self-distill", "export-self-distilled"]

    def test_a_whole_teacher_is_not_fine_tuned(self, imported: dict[str, Any]) -> None:
        run = run_of(imported)
        finish(run.imported, made="classifier")
        with pytest.raises(ConfigError, match=r"nothing to fine-tune; go on with `distill export-teacher`, or set import.take=pretrained"):
            verbs.finetune(run)
        assert not run.finetune.folder.exists()

    def test_other_crops_than_the_teachers_are_said(self, imported: dict[str, Any], tmp_path: Path) -> None:
        seen = Preprocessing(image_size=8, crop_ratio=1.0, interpolation="bicubic")
        card = ClassifierCard(network=TEACHER, class_names=("cat", "dog"), preprocessing=seen)
        save_classifier(tmp_path / "teacher" / "checkpoint", build_classifier(TEACHER, 2, seen), card)
        of_teacher = f"import.path={tmp_path / 'teacher'}"
        notes = verbs.import_teacher(run_of(imported, of_teacher))["notes"]
        assert [note.partition(":")[0] for note in notes] == [
            "data.crop_ratio is 0.875, but it was made for 1",
            "data.interpolation is bilinear, but it was made for bicubic",
        ]
        same = run_of(imported, of_teacher, "data.crop_ratio=1.0", "data.interpolation=bicubic", f"run_dir={tmp_path / 'same'}")
        assert verbs.import_teacher(same)["notes"] == []

    def test_what_a_network_of_timm_wants_is_said(self, tree: dict[str, Any], tmp_path: Path) -> None:
        imported = {**tree, "import": {"kind": "timm", "timm_name": "mobilenetv3_small_050"}}
        run = run_of(imported, "data.image_size=32", "data.std=[0.229,0.224,0.225]")
        notes = verbs.import_teacher(run)["notes"]
        assert [note.partition(",")[0] for note in notes if note.startswith("data.")] == [
            "data.mean is [0",
            "data.interpolation is bilinear",
        ]

    def test_of_a_classifier_and_a_pretrained_network_the_run_takes_what_it_says(self, imported: dict[str, Any], tmp_path: Path) -> None:
        card = ClassifierCard(network=TEACHER, class_names=("cat", "dog"), preprocessing=Preprocessing(image_size=8))
        save_classifier(tmp_path / "other" / "checkpoint", build_classifier(TEACHER, 2, card.preprocessing), card)
        made = {}
        for take in ("auto", "classifier", "pretrained"):
            run = run_of(imported, f"import.take={take}", f"run_dir={tmp_path / take}")
            made[take] = verbs.import_teacher(run)["made"]
            assert (run.origin.name == "finetune") == (made[take] == "pretrained")
        assert made == {"auto": "classifier", "classifier": "classifier", "pretrained": "pretrained"}
        card = card.replace(origin={"looked_on": True})
        save_classifier(tmp_path / "other" / "checkpoint", build_classifier(TEACHER, 2, card.preprocessing), card)
        assert verbs.import_teacher(run_of(imported, f"run_dir={tmp_path / 'looked on'}"))["made"] == "pretrained"
        shutil.rmtree(tmp_path / "other" / "pretrained")
        with pytest.raises(CheckpointError, match=r"take: pretrained, but .* holds no pretrained checkpoint"):
            verbs.import_teacher(run_of(imported, "import.take=pretrained", f"run_dir={tmp_path / 'none'}"))

    def test_a_graph_needs_a_network_for_its_own_student(self, imported: dict[str, Any]) -> None:
        run = run_of(imported)
        finish(run.imported, made="teacher")
        with pytest.raises(ConfigError, match=r"name one in self_distill.network"):
            _ = run.self_training
        named = run_of(imported, "self_distill.network.depth=10", "self_distill.num_head_layers=1")
        student = named.self_training.students[0]
        assert (student.network.depth, student.num_head_layers) == (10, 1)
        assert [stage.name for stage in named.teachers][:2] == ["import", "export-teacher"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_teachers_labels_have_a_store_of_their_own(tree: dict[str, Any], tmp_path: Path, elsewhere: bool) -> None:
    store = tmp_path / "labels" if elsewhere else tmp_path / "run" / "store"
    run = run_of(tree, *([f"store.path={store}"] if elsewhere else []))
    finish(run.first_teacher, fingerprint="first")
    finish(run.second_teacher, fingerprint="second")
    jobs = (
        run.distill_job(ADDRESS, run.first_teacher, run.self_training),
        run.distill_job(ADDRESS, run.second_teacher, run.file.train),
    )
    folders = [Path(str(job.store_folder)) for job in jobs]
    assert [folder.parent for folder in folders] == [store, store]
    assert folders[0] != folders[1]


@pytest.mark.parametrize(
    ("verb", "moved"),
    [
        ("finetune", {"finetune"}),
        ("self-distill", {"self-distill", "export-self-distilled"}),
        ("label", set()),
        ("quickstart", set(Run.STAGES)),
    ],
)
def test_fresh_moves_aside_what_the_verb_makes(tree: dict[str, Any], verb: str, moved: set[str]) -> None:
    run = run_of(tree)
    for name in (*Run.STAGES, "store"):
        (run.folder / name).mkdir()
    verbs.forget(run, verb)
    left = {path.name for path in run.folder.iterdir()} - {"old"}
    assert left == {*Run.STAGES, "store"} - moved


def test_the_table_names_both_teachers() -> None:
    scores = {"scores": {"top1": 0.5, "ece": 0.1}}
    alone = {"teacher": scores, "students": {}, "controls": {}}
    for evaluation, names in ((alone, ["teacher"]), ({**alone, "first_teacher": scores}, ["first teacher", "teacher, self-distilled"])):
        assert list(result_table({"stages": {"evaluate": evaluation}}).columns[0].cells) == names


@pytest.mark.parametrize(
    ("verb", "override", "said"),
    [
        ("pretrain", "pretrain.global_batch=9", "pretrain.global_batch 9 is larger than the 8 images"),
        ("finetune", "data.label_fraction=0.01", "fraction 0.01 of the 4 images of class"),
        ("finetune", "data.test.path={images}/cat", r"\(data.test\) has images without labels"),
        ("finetune", "data.class_names=[cat, cow, dog, fox]", r"no image of 2 of 4 classes: 1 \(cow\), 3 \(fox\); give at least one"),
        ("pretrain", "pretrain.network.depth=101", "image_size 8 is smaller than the network's total stride 32"),
    ],
)
def test_bad_input_is_refused_before_what_is_finished_moves(
    tree: dict[str, Any], images: Path, verb: str, override: str, said: str
) -> None:
    good = run_of(tree, "pretrain.global_batch=4")
    finish(good.pretrain)
    finish(good.finetune)
    kept = good.folder / verb / "stage.json"
    before = kept.read_bytes()
    with pytest.raises(DistillError, match=said):
        getattr(verbs, verb)(run_of(tree, "pretrain.global_batch=4", override.format(images=images)))
    assert kept.read_bytes() == before
    assert not (good.folder / "old").exists()


def test_a_new_store_is_said(tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run folder is relative, as in every recipe."""
    monkeypatch.chdir(Path(tree["run_dir"]).parent)
    run = run_of(tree, "run_dir=run")
    finish(run.first_teacher, fingerprint="f" * 64)
    job = run.distill_job(TeacherAddress(model="x", repository="y"), run.first_teacher, run.file.train)
    for _ in range(2):
        verbs._say_new_store(job)
        assert "a new label store, of this teacher" in capsys.readouterr().out
    assert job.store_identity is not None
    SoftLabelStore(str(job.store_folder), job.store_identity)
    verbs._say_new_store(job)
    assert capsys.readouterr().out == ""
