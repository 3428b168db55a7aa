"""Settings of the export: the parity gate, the Triton model repository, the edge files.

They stand apart from the code that they steer, so that reading a run file imports neither torch nor onnx.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from distill.config import Section


class ParityLimits(Section):
    """How far an exported graph may be from the network it came from. Measured on real crops, in label space."""

    max_logit_error: float = Field(default=1e-3, ge=0)
    """Largest allowed |logit of the graph - logit of the network|."""
    max_kl: float = Field(default=1e-5, ge=0)
    """Largest allowed KL(network || graph) of one crop, in nats, at every temperature that is checked."""
    min_top1_agreement: float = Field(default=0.99, ge=0, le=1)
    """Smallest allowed share of crops with the same most likely class."""
    max_soft_label_error: float = Field(default=1e-5, ge=0)
    """Largest allowed |soft label of the graph - softmax(its own logits / temperature)|, with mixed temperatures in one batch."""


class RepositorySettings(Section):
    """How Triton is to run a teacher: batching, queue, instances. Written into `config.pbtxt`."""

    max_batch_size: int = Field(default=256, ge=1, le=4096)
    """Largest batch that Triton forms or accepts."""
    preferred_batch_sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Batch sizes that the dynamic batcher sends on at once; those above `max_batch_size` are left out."""
    max_queue_delay_us: int = Field(default=2000, ge=0)
    """How long the dynamic batcher waits for a preferred batch, in microseconds."""
    max_queue_size: int = Field(default=512, ge=1)
    """Requests that may wait; one more is refused at once. Triton's own default, no bound, is not offered."""
    queue_timeout_us: int = Field(default=10_000_000, ge=0)
    """A request that waited longer is refused, in microseconds; 0 lets it wait. A request may bring a shorter one, if this is not 0."""
    instance_count: int = Field(default=1, ge=1, le=64)
    """Copies of the teacher that run at the same time, on each device."""
    instance_kind: Literal["cpu", "gpu"] = "cpu"
    """Where the copies run."""
    intra_op_threads: int = Field(default=0, ge=0)
    """Threads of one copy on the CPU; 0 lets ONNX Runtime decide."""
    warmup_batch_sizes: tuple[int, ...] = (1,)
    """Batches run before the model is ready, so that the first answer is not the slowest; those above `max_batch_size` are left out."""

    @model_validator(mode="after")
    def _batch_sizes_are_positive(self) -> Self:
        sizes = (*self.preferred_batch_sizes, *self.warmup_batch_sizes)
        if min(sizes, default=1) < 1:
            raise ValueError(f"batch sizes are at least 1, got {min(sizes)}")
        return self


class TeacherExportSettings(Section):
    """From a fine-tuned or imported teacher to a model that Triton serves."""

    name: str = Field(default="teacher", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Name of the model in the repository and in REST paths."""
    default_temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature used when a request names none."""
    opset: int = Field(default=20, ge=18, le=23)
    """ONNX operator set of the graph."""
    num_parity_images: int = Field(default=256, ge=1)
    """Real crops that the graph and the network are compared on."""
    parity_temperatures: tuple[float, ...] = Field(default=(1.0, 4.0), min_length=1)
    """Temperatures that the comparison is made at."""
    parity: ParityLimits = ParityLimits()
    """How far the graph may be from the network."""
    repository: RepositorySettings = RepositorySettings()
    """How Triton is to run it."""

    @model_validator(mode="after")
    def _temperatures_are_positive(self) -> Self:
        if min(self.parity_temperatures) <= 0:
            raise ValueError(f"parity_temperatures are above 0, got {self.parity_temperatures}")
        return self


class Int8Gate(Section):
    """What an int8 file must win over the fp32 file, and may lose, to be shipped."""

    max_latency_ratio: float = Field(default=0.7, gt=0)
    """Largest allowed latency of int8 / fp32 (medians at batch 1, one thread)."""
    max_size_ratio: float = Field(default=0.3, gt=0)
    """Largest allowed file size of int8 / fp32."""
    max_accuracy_drop: float = Field(default=0.01, ge=0, le=1)
    """Largest allowed loss of top-1 accuracy, as a share (0.01 is one point); of agreement with fp32 where no labels are given."""


class StudentExportSettings(Section):
    """From a trained student to files for the edge device."""

    int8: bool = True
    """Also make an int8 file."""
    opset: int = Field(default=20, ge=18, le=23)
    """ONNX operator set of the files."""
    num_calibration_images: int = Field(default=256, ge=8)
    """Unlabelled crops that the int8 ranges are measured on."""
    reduce_range: bool = False
    """7-bit weights, for edge devices with an x86 processor without VNNI, whose 8-bit multiply-add saturates."""
    num_parity_images: int = Field(default=256, ge=1)
    """Crops that the fp32 file and the network are compared on."""
    parity: ParityLimits = ParityLimits()
    """How far the fp32 file may be from the network."""
    gate: Int8Gate = Int8Gate()
    """What int8 must win, and may lose, to be shipped."""
    latency_rounds: int = Field(default=5, ge=1)
    """Rounds of the latency measurement; the median round counts."""
    latency_repeats: int = Field(default=50, ge=5)
    """Timed runs of each file in one round."""


class ImportSettings(Section):
    """A teacher trained elsewhere, in place of pretraining and fine-tuning. `data` states its crop size, mean, std and class names."""

    kind: Literal["onnx", "timm"]
    """`onnx`: a ready ONNX classifier; `timm`: one of timm's networks with weights from a local file."""
    path: str
    """The ONNX file, or the weights of the timm network (`.safetensors`, or `.pth` that holds tensors only)."""
    timm_name: str | None = None
    """timm's name of the network."""
    logits: str | None = None
    """The tensor that holds the logits, where an ONNX model has several outputs or ends in a softmax."""

    @model_validator(mode="after")
    def _timm_has_a_name(self) -> Self:
        if self.kind == "timm" and not self.timm_name:
            raise ValueError("timm_name is needed with kind: timm")
        return self
