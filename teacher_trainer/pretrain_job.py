"""What the workers of stage 1 are told: one job, as plain data; what is refused at once; and what names its result."""

from __future__ import annotations

from distill.config import Section, digest_of
from distill.data_settings import DataSettings
from distill.errors import ConfigError
from distill.sources import Source
from distill.teacher_info import CROPPING
from teacher_trainer.settings import PretrainSettings


class PretrainJob(Section):
    """Everything that a worker needs to know to pretrain one network; plain data."""

    data: DataSettings
    """The images, by absolute paths."""
    pretrain: PretrainSettings
    """The network, and how it is trained."""
    seed: int
    """Seed of weights, plan, crops and distortions."""
    rejected_path: str
    """Where unusable images are listed."""


def check_job(settings: PretrainSettings, source: Source, world: int) -> None:
    """Refuse what cannot be done with these images and workers.

    Raises:
        ConfigError: a part of the batch for each worker that is less than one image, a batch larger than the images, or a queue longer
            than an epoch.
    """
    if settings.global_batch < world:
        raise ConfigError(
            f"pretrain.global_batch {settings.global_batch} gives {world} workers less than 1 image each;"
            f" make it at least {world} or ray.num_workers smaller"
        )
    if settings.global_batch > source.num_images:
        raise ConfigError(
            f"pretrain.global_batch {settings.global_batch} is larger than the {source.num_images} images there are; make it smaller"
        )
    num_views = 2 * source.num_images
    if settings.memory and settings.memory.size > num_views:
        raise ConfigError(
            f"pretrain.memory.size {settings.memory.size} is more than the {num_views} views of one epoch, and would hold older views of"
            f" the same images; give at most {num_views}"
        )


def identity_of(job: PretrainJob, source: Source) -> str:
    """Names everything that the weights depend on, and nothing else: another interval of saving must not start afresh."""
    without_effect = {"checkpoint_every_s", "checkpoint_blocks"}
    return digest_of(
        {
            "settings": job.pretrain.model_dump(mode="json", exclude=without_effect),
            "preprocessing": job.data.preprocessing.model_dump(mode="json", exclude=CROPPING),
            "window_shards": job.data.window_shards,
            "seed": job.seed,
            "images": source.digest(),
        }
    )
