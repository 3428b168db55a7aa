"""Settings of the images: where they are, what their classes are called, how large a crop is."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from distill.config import Section
from distill.crops import Interpolation
from distill.teacher_info import Preprocessing


class ImagesSettings(Section):
    """One set of images."""

    path: str
    """A folder (class folders or flat), WebDataset shards (`train-*.tar.gz`, `train-{000..011}.tar`), or Parquet; local or a URL
    such as s3://. Relative to where `distill` is started."""
    image_column: str | None = None
    """Parquet: the column with the encoded images. Default: the one that looks like it."""
    label_column: str | None = None
    """Parquet: the column with the class, a number or a name."""
    id_column: str | None = None
    """Parquet: a column of unique ids. Default: file and row."""
    records_per_shard: int = Field(default=1000, ge=1)
    """Folder: how many images are read and labelled together as one shard."""


class DataSettings(Section):
    """The images of a run."""

    unlabelled: ImagesSettings
    """The images that the teacher labels and the students learn from. Their labels, if any, are not looked at."""
    labelled: ImagesSettings
    """The images whose labels fine-tune the teacher."""
    test: ImagesSettings
    """Labelled images that everything is evaluated on."""
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of `labelled` whose labels are used: that share of every class, drawn by the seed, so the classes keep their proportions."""
    labelled_ids: str | None = None
    """Instead of a fraction: a text file with the image ids of `labelled` whose labels are used, one a line; `#` begins a comment line. The
    ids are those of `rejected.jsonl`: the path inside a folder, shard and key, or Parquet's id column. A file name without its folder
    will do where only one image is called so."""
    class_names: list[str] | None = None
    """Names of the classes in the order of their ids. Default: folder names, or `class_names.txt` beside the shards."""
    image_size: int = Field(default=224, ge=8, le=1024)
    """Height and width, in pixels, of the crops that teacher and students see."""
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    """Evaluation crop: the shorter side is resized to image_size / crop_ratio, then the centre is cut. 1 for images already small."""
    interpolation: Interpolation = "bilinear"
    """Filter that resizes crops, of evaluation, fine-tuning and distillation; SimCLRv2 and most networks of timm have learnt on `bicubic`.
    Pretraining has the official code's, which is bicubic."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean of R, G, B on the scale 0 to 1, subtracted in every network's first layer. SimCLRv2 uses 0."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Standard deviation of R, G, B on the scale 0 to 1, divided by in every network's first layer. SimCLRv2 uses 1."""
    max_rejected_share: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable images up to which a job goes on; while it has not tried all, it stops only when the share is above this by more
    than chance. Each is listed in `rejected.jsonl`."""
    window_shards: int = Field(default=4, ge=1)
    """Shards whose images are shuffled together; also what is held in memory."""
    num_threads: int = Field(default=2, ge=1)
    """Threads that decode and crop, per worker."""

    def absolute(self) -> DataSettings:
        """The same images by absolute paths, for processes that start elsewhere. URLs stay as they are."""
        sets = {name: getattr(self, name) for name in ("unlabelled", "labelled", "test")}
        moved = {n: s.replace(path=s.path if "://" in s.path else str(Path(s.path).absolute())) for n, s in sets.items()}
        return self.replace(**moved, labelled_ids=self.labelled_ids and str(Path(self.labelled_ids).absolute()))

    @model_validator(mode="after")
    def _one_choice_of_labels(self) -> Self:
        if self.labelled_ids is not None and self.label_fraction != 1:
            raise ValueError(f"labelled_ids and label_fraction {self.label_fraction:g} both choose labels; give one of them")
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """The contract of every network trained in this run."""
        return Preprocessing(
            image_size=self.image_size, mean=self.mean, std=self.std, crop_ratio=self.crop_ratio, interpolation=self.interpolation
        )
