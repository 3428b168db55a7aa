"""Students in ExecuTorch, with XNNPACK for the CPU: `<name>.fp32.pte` and `<name>.int8.pte`.

int8 is quantised anew from the network, on the same calibration crops (weights per channel, activations int8), since ExecuTorch reads no
ONNX. A .pte file has no room for metadata: what `StudentInfo` says lies beside it, in `<file>.json`. Batches run one crop at a time.

Unit of data: one file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill.errors import BadInput, DistillError
from export.files import first_line, write_atomically
from export.label_space import Crops, Logits
from export.runtimes.runtime import Predict

if TYPE_CHECKING:
    from export.edge import StudentInfo
    from export.measured import MadeFile
    from export.packages import Networks, Package


def open_file(path: Path, num_threads: int) -> Predict:
    """See `Runtime`. Threads are those of the whole process: the last file that is opened decides."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != num_threads:
        portable_lib._unsafe_reset_threadpool(num_threads)
    try:
        program = Runtime.get().load_program(str(path))
        method = program.load_method("forward")
    except RuntimeError as error:
        raise BadInput(f"{path} does not load in ExecuTorch: {first_line(error)}") from error
    if method is None:
        raise BadInput(f"{path} has no method `forward`: it was not made by `distill export-student`")

    def predict(crops_BHWC: Crops) -> Logits:
        crops = torch.from_numpy(np.ascontiguousarray(crops_BHWC))
        return np.concatenate([method.execute([crops[row : row + 1]])[0].numpy().copy() for row in range(len(crops))])

    return predict


def engine() -> str:
    """See `Runtime`."""
    from executorch import version
    from executorch.runtime import Runtime

    Runtime.get()  # loads the runtime: memory is told without the runtime's own
    return f"ExecuTorch {version.__version__.partition('+')[0]} (XNNPACK)"


def convert(networks: Networks, onnx_files: Sequence[MadeFile], calibration_crops: Crops, info: StudentInfo, out_dir: Path) -> Package:
    """See `Converter`."""
    from export.graph import evaluating
    from export.measured import MadeFile
    from export.packages import Package

    example = (torch.zeros(1, info.preprocessing.image_size, info.preprocessing.image_size, 3, dtype=torch.uint8),)
    files = []
    with evaluating(networks.floats), evaluating(networks.int8), _quiet():
        for kind, training_steps in ((file.kind, file.training_steps) for file in onnx_files if file.kind != "fp16"):
            path = out_dir / f"{info.name}.{kind}.pte"
            try:
                module = torch.export.export(networks.int8 if kind == "int8" else networks.floats, example).module()
                if kind == "int8":
                    module = _quantised(module, calibration_crops)
                program = torch.export.export(module, example)
                write_atomically(path, _lowered(program))
            except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
                raise DistillError(
                    f"ExecuTorch cannot convert {info.name} ({kind}): {first_line(error)}; leave executorch out of edge.formats"
                ) from error
            described = path.with_name(path.name + ".json")
            write_atomically(described, (info.model_dump_json(indent=2) + "\n").encode())
            shares = _weight_shares(program)
            files.append(
                MadeFile(kind, path, runtime="executorch", beside=(described,), training_steps=training_steps, weight_shares=shares)
            )
    return Package(files=tuple(files))


def _quantised(module: Any, crops: Crops) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    with torch.no_grad():
        for row in range(len(crops)):
            prepared(torch.from_numpy(crops[row : row + 1]))
    return convert_pt2e(prepared)


def _lowered(program: Any) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _weight_shares(program: Any) -> tuple[float, float]:
    """Shares of int8 and of half precision among the elements of all weights with two axes or more that the program reads. (A quantised one
    still holds the floats that it was made of, which nothing reads any more and which do not get into the file.)"""
    signature, held = program.graph_signature, {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    read = [held[names[node.name]] for node in program.graph.nodes if node.op == "placeholder" and node.users and node.name in names]
    weights = [tensor for tensor in read if isinstance(tensor, torch.Tensor) and tensor.ndim > 1]
    total = sum(tensor.numel() for tensor in weights) or 1
    of_int8, of_half = (sum(w.numel() for w in weights if w.dtype == kind) / total for kind in (torch.int8, torch.float16))
    return of_int8, of_half


@contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch and torchao warn about what they will change one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
