"""Settings of the export: the parity gate, the Triton model repository, the edge files.

They stand apart from the code that they steer, so that reading a run file imports neither torch nor onnx.
"""

from __future__ import annotations

from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from distill.config import Section
from distill.crops import Interpolation
from distill.errors import ConfigError
from distill.models.arch_names import arch_name, parse_arch
from distill.teacher_info import Preprocessing

EdgeFormat = Literal["onnx", "openvino", "executorch", "litert", "coreml"]
"""Packages that a student can be written as; each but `onnx` is an extra of ours of the same name."""


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


Precision = Literal["fp32", "fp16", "int8"]

PARITY_OF: dict[Precision, ParityLimits] = {
    "fp32": ParityLimits(),
    "fp16": ParityLimits(max_logit_error=0.1, max_kl=5e-4),
    "int8": ParityLimits(max_logit_error=3.0, max_kl=0.5, min_top1_agreement=0.95),
}
"""Limits where none are given: two to three times the largest of what ResNet-20 and ResNet-56 gave on 256 test images of CIFAR-10, with
logits of up to 33: fp32 1e-5 (KL 1e-11), fp16 0.035 (KL 1.1e-4), int8 1.35 (KL 0.2, agreement 0.99)."""


class RepositorySettings(Section):
    """How Triton is to run a teacher: batching, queue, instances. Written into `config.pbtxt`."""

    max_batch_size: int = Field(default=256, ge=1, le=4096)
    """Largest batch that Triton forms or accepts."""
    preferred_batch_sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Batch sizes that the dynamic batcher sends on at once; those above `max_batch_size` are left out."""
    max_queue_delay_us: int = Field(default=0, ge=0)
    """How long the dynamic batcher waits for a preferred batch, in microseconds. With 0 a batch forms of what came while the teacher was
    busy, and a lone request waits for nobody."""
    max_queue_size: int = Field(default=512, ge=1)
    """With two or more instances: requests that may wait in Triton; one more is refused at once. With one, a bound costs Triton most of its
    speed (bench/serving), so only those of the gateway and of the clients hold."""
    queue_timeout_us: int = Field(default=10_000_000, ge=0)
    """With two or more instances: a request that waited longer is refused, in microseconds; 0 lets it wait. A request may bring a shorter
    one, if this is not 0."""
    instance_count: int = Field(default=1, ge=1, le=64)
    """Copies of the teacher that run at the same time, on each device."""
    instance_kind: Literal["cpu", "gpu"] = "cpu"
    """Where the copies run."""
    acceleration: Literal["none", "tensorrt"] = "none"
    """`tensorrt`: Triton's ONNX Runtime hands the graph to TensorRT, which builds an engine for this GPU when the model is loaded."""
    tensorrt_workspace_bytes: int = Field(default=4 * 2**30, ge=2**20)
    """GPU memory that TensorRT may use while it works."""
    tensorrt_cache: str = Field(default="/var/cache/distill-tensorrt", pattern=r"^/")
    """Folder on the Triton machine for built engines, absolute; on a volume of its own they outlive the container."""
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

    @model_validator(mode="after")
    def _tensorrt_has_a_gpu(self) -> Self:
        if self.acceleration == "tensorrt" and self.instance_kind != "gpu":
            raise ValueError("acceleration: tensorrt needs instance_kind: gpu; TensorRT has no CPU form")
        return self


class TeacherExportSettings(Section):
    """From a fine-tuned or imported teacher to a model that Triton serves."""

    name: str = Field(default="teacher", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Name of the model in the repository and in REST paths."""
    default_temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature used when a request names none."""
    opset: int = Field(default=20, ge=18, le=23)
    """ONNX operator set of the graph."""
    precision: Precision = "fp32"
    """`fp16`: weights and arithmetic in half precision, for a GPU; softmax and layers that would overflow stay in fp32. `int8`: weights and
    activations in 8 bits, their ranges measured on real crops (weights in 7 where the gate would refuse 8, as it does on processors without
    VNNI that saturate). Crops, logits and soft labels keep their types. Each has limits of its own
    where `parity` is not given: fp16 0.1 in a logit and 5e-4 in KL; int8 3 and 0.5, with an agreement of 0.95."""
    input_size: int | None = Field(default=None, ge=1, le=4096)
    """Height and width, in pixels, of the crops that travel, where it is not the size that the teacher was trained on: then the graph
    resizes them first (bilinear, averaging where they get smaller). In a run it is data.image_size. None: its own size travels."""
    top_outputs: int | None = Field(default=None, ge=1)
    """For many classes: the graph also gives the largest `top_outputs` logits of each crop and their class ids, largest first."""
    num_parity_images: int = Field(default=256, ge=1)
    """Real crops that the graph and the network are compared on."""
    num_calibration_images: int = Field(default=256, ge=8)
    """Further real crops that the ranges of fp16 and int8 are measured on. Where there are not enough images for both, a fifth of them;
    fp16 and int8 need at least 32 images to compare and 8 further ones."""
    parity_temperatures: tuple[float, ...] = Field(default=(1.0, 4.0), min_length=1)
    """Temperatures that the comparison is made at."""
    parity: ParityLimits | None = None
    """How far the graph may be from the network. What is left out is taken from the defaults of the precision."""
    repository: RepositorySettings = RepositorySettings()
    """How Triton is to run it."""

    @property
    def limits(self) -> ParityLimits:
        """How far the graph may be from the network."""
        return self.parity or PARITY_OF[self.precision]

    @property
    def num_crops(self) -> int:
        """Real crops that an export asks for: those that are compared, and those that ranges are measured on."""
        return self.num_parity_images + (self.num_calibration_images if self.precision != "fp32" else 0)

    @model_validator(mode="before")
    @classmethod
    def _limits_are_over_those_of_the_precision(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("parity"), dict):
            usual = PARITY_OF.get(given.get("precision", "fp32"), ParityLimits())
            return {**given, "parity": {**usual.model_dump(), **given["parity"]}}
        return given

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
    """Largest allowed loss of top-1 accuracy, as a share (0.01 is one point); of agreement with fp32 where no labels are given. It holds
    for the other kinds of files, too."""


class SensitiveLayers(Section):
    """Where plain int8 loses too much: layers that hurt are looked for on the calibration crops and stay in float."""

    max_layers: int = Field(default=3, ge=0)
    """Most layers that stay in float; 0 does not look for any."""
    max_seconds: float = Field(default=60.0, gt=0)
    """For how long layers are tried alone, in seconds; those that were not reached are not found. Trying the worst together may take as
    long again."""


class QuantisedTraining(Section):
    """Where int8 still loses too much: a short fine-tuning of the student, its rounding put into the forward pass, on the soft labels that
    the run has stored. No teacher is asked."""

    when: Literal["auto", "never", "always"] = "auto"
    """`auto`: only where no other int8 file passes the gate, and those without layers in float lose too much accuracy. `always`: in any
    case; the better file is kept."""
    steps: int = Field(default=400, ge=1)
    """Updates, of `train.global_batch` images each."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak rate of AdamW; a short warm-up, then a cosine to 0."""


class StudentExportSettings(Section):
    """From a trained student to files for the edge device."""

    formats: list[EdgeFormat] = Field(default_factory=lambda: list[EdgeFormat](["onnx"]))
    """Kinds of packages. `onnx` is always made, as the others are compared with it. What is asked for and not installed is refused."""
    fp16: bool = True
    """Also make a file with weights and arithmetic in half precision."""
    int8: bool = True
    """Also make an int8 file."""
    opset: int = Field(default=20, ge=18, le=23)
    """ONNX operator set of the files."""
    num_calibration_images: int = Field(default=256, ge=8)
    """Unlabelled crops that the int8 ranges are measured on."""
    reduce_range: bool = False
    """7-bit weights, for edge devices with an x86 processor without VNNI, whose 8-bit multiply-add saturates. Where 8 bits lose too much on
    this machine, 7 are tried anyway."""
    sensitive_layers: SensitiveLayers = SensitiveLayers()
    """Layers of the int8 file that stay in float."""
    quantised_training: QuantisedTraining = QuantisedTraining()
    """Fine-tuning for int8."""
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
    peak_memory: bool = True
    """Also measure how much memory each file takes, in a process of its own (Linux only)."""

    @field_validator("formats")
    @classmethod
    def _each_format_once(cls, formats: list[EdgeFormat]) -> list[EdgeFormat]:
        twice = sorted({name for name in formats if formats.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given more than once; name each format once")
        return formats


Take: TypeAlias = Literal["auto", "classifier", "pretrained"]
"""What of an import a run goes on with."""

_ONLY_FOR = {
    "timm_name": ("timm",),
    "arch": ("torch",),
    "logits": ("onnx",),
    "classifier_after": ("simclr",),
    "use_ema": ("simclr", "timm", "torch"),
    "take": ("simclr", "checkpoint"),
}
"""Field of `ImportSettings` -> the kinds that it means something to."""


class ImportSettings(Section):
    """A teacher trained elsewhere, in place of pretraining and fine-tuning. `data` states its crop size, mean, std and class names.
    `distill import KIND` does the same without a run file; docs/importing.md shows both."""

    kind: Literal["simclr", "timm", "torch", "onnx", "checkpoint"]
    """`simclr`: a published SimCLRv2 checkpoint; `timm`: one of timm's networks with weights from a local file; `torch`: a state dict of
    the network `arch`; `onnx`: a ready ONNX classifier; `checkpoint`: one of ours, from `distill import` or another run."""
    path: str | None = Field(default=None, min_length=1)
    """`simclr`: the checkpoint's folder or prefix; `timm`, `torch`: the weights (`.safetensors`, or `.pth` that holds tensors only; with
    `timm` none leaves them random); `onnx`: the file, or the folder that `distill import onnx` made; `checkpoint`: the folder."""
    timm_name: str | None = None
    """`timm`: timm's name of the network."""
    arch: str | None = None
    """`torch`: the network, `timm:NAME` or one of ours, spelled `resnetDEPTH[-xWIDTH][-sk[RATIO]][-cifar]`: `resnet50`, `resnet152-x3-sk`,
    `resnet18-x0.5-cifar`."""
    logits: str | None = None
    """`onnx`: the tensor that holds the logits, where a model has several outputs or ends in a softmax."""
    classifier_after: int | None = Field(default=None, ge=-1)
    """`simclr`: layers of the projection head below the classifier; -1 for all. Default: what the checkpoint itself shows."""
    use_ema: bool = False
    """`simclr`, `timm`, `torch`: take the moving average of the weights that lies beside them in the file."""
    take: Take = "auto"
    """`simclr`, `checkpoint`: what the run goes on with where both are there. `classifier`: it is the teacher. `pretrained`: backbone and
    projection head, to be fine-tuned. `auto`: `pretrained` where a file's classifier only looked on in pretraining, else `classifier`."""

    @field_validator("arch")
    @classmethod
    def _arch_is_spelled_right(cls, arch: str | None) -> str | None:
        try:
            return arch if arch is None else arch_name(parse_arch(arch))
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        for name, kinds in _ONLY_FOR.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"{name} is for kind {' or '.join(kinds)}, not for {self.kind}; leave it out")
        for name, needing in (("timm_name", {"timm"}), ("arch", {"torch"}), ("path", {"simclr", "torch", "onnx", "checkpoint"})):
            if self.kind in needing and not getattr(self, name):
                raise ValueError(f"{name} is needed with kind: {self.kind}")
        return self


class StatedPreprocessing(Section):
    """What is stated of the preprocessing of a teacher from elsewhere; what is left out is taken from the network itself, or is usual."""

    image_size: int | None = Field(default=None, ge=1, le=4096)
    """Height and width, in pixels, of the crops that it was trained on."""
    mean: tuple[float, float, float] | None = None
    """Mean of R, G, B on the scale 0 to 1 that it was trained with."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of R, G, B on the scale 0 to 1 that it was trained with."""
    crop_ratio: float | None = Field(default=None, gt=0, le=1)
    """Evaluation crop: the shorter side is resized to image_size / crop_ratio, then the centre is cut."""
    interpolation: Interpolation | None = None
    """Filter of that resize."""

    @field_validator("mean")
    @classmethod
    def _mean_is_of_pixels(cls, mean: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if mean and not 0 <= min(mean) <= max(mean) <= 1:
            raise ValueError(f"{mean} is not on the scale 0 to 1; divide numbers of the scale 0 to 255 by 255")
        return mean

    @field_validator("std")
    @classmethod
    def _std_divides(cls, std: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if std and min(std) <= 0:
            raise ValueError(f"{std} is not above 0; give 1,1,1 where nothing is divided")
        return std

    def over(self, usual: Preprocessing) -> Preprocessing:
        """`usual`, with what is stated in its place."""
        return usual.replace(**self.model_dump(exclude_none=True))


def usual_crop_ratio(image_size: int) -> float:
    """0.875, but the whole image where it is as small as CIFAR's: the rule of the official SimCLRv2 code."""
    return 1.0 if image_size <= 32 else 0.875
