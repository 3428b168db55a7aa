"""What the parity gate compares with the network: anything that takes crops and temperatures and gives logits, such as ONNX Runtime.

Unit of data: one batch of crops. Shapes: B crops, H W pixels, K classes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnxruntime as ort

from distill.errors import BadInput
from distill.wire import IMAGES, LOGITS, SOFT_LABELS, TEMPERATURE
from export.label_space import Crops, Logits
from export.sessions import ORT_ERRORS, open_session, open_session_of, short

if TYPE_CHECKING:
    import onnx


class Runner(Protocol):
    """A graph in an engine."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        ...

    @property
    def engine(self) -> str:
        """What it runs in, for the report."""
        ...

    @property
    def gives_soft_labels(self) -> bool:
        """Whether it is a teacher."""
        ...

    def __call__(self, crops_BHWC: Crops, temperature_B1: Logits) -> tuple[Logits, Logits | None]:
        """uint8 [B,H,W,3] and float32 [B,1] -> logits [B,K], and soft labels [B,K] of a teacher.

        Raises:
            BadInput: the engine does not take these crops.
        """
        ...


class OnnxRunner:
    """A teacher or student graph of ours in ONNX Runtime on the CPU."""

    def __init__(self, session: ort.InferenceSession, name: str, engine: str = f"ONNX Runtime {ort.__version__}, CPU") -> None:
        self.name = name
        self.engine = engine
        self.gives_soft_labels = SOFT_LABELS in {output.name for output in session.get_outputs()}
        self._session = session

    @classmethod
    def of_file(cls, path: Path) -> OnnxRunner:
        """Raises BadInput: the file is missing, or ONNX Runtime refuses it."""
        return cls(open_session(path), path.name)

    @classmethod
    def of_model(cls, model: onnx.ModelProto, name: str, engine: str) -> OnnxRunner:
        """Raises BadInput: ONNX Runtime refuses the model."""
        from export.large_models import is_large, save_weights  # brings onnx, which TensorRT's engines do without

        if not is_large(model):
            return cls(open_session_of(model.SerializeToString(), name), name, engine)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(save_weights(model, path).SerializeToString())
            return cls(open_session(path), name, engine)

    def __call__(self, crops_BHWC: Crops, temperature_B1: Logits) -> tuple[Logits, Logits | None]:
        """See Runner."""
        feed: dict[str, Any] = {IMAGES: crops_BHWC} | ({TEMPERATURE: temperature_B1} if self.gives_soft_labels else {})
        wanted = [LOGITS, SOFT_LABELS] if self.gives_soft_labels else [LOGITS]
        try:
            answer = self._session.run(wanted, feed)
        except ORT_ERRORS as error:
            raise BadInput(f"the graph does not take crops of shape {crops_BHWC.shape[1:]}: {short(error)}") from error
        return answer[0], answer[1] if self.gives_soft_labels else None
