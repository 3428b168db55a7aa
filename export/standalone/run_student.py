"""Run a distilled student on an image. Needs numpy, Pillow and the runtime of the file.

python run_student.py student.int8.onnx photo.jpg [--top 5] [--json]

.onnx needs onnxruntime; .xml needs openvino, and its .bin beside it; .pte needs executorch, and its .pte.json beside it; .tflite needs
ai-edge-litert.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps

Opened = tuple[str, Callable[[np.ndarray], np.ndarray]]


def open_onnx(path: str) -> Opened:
    """What the file says of itself, and a function from uint8 crops [B,S,S,3] to logits [B,K]; so are the next three."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["distill.student"], lambda crops: session.run(["logits"], {"images": crops})[0]


def open_openvino(path: str) -> Opened:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model.get_rt_info("distill_student").astype(str), lambda crops: compiled([crops])[0]


def open_executorch(path: str) -> Opened:
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)  # its methods do not keep it alive
    method = program.load_method("forward")
    said = Path(path + ".json").read_text(encoding="utf-8")
    return said, lambda crops, program=program: method.execute([torch.from_numpy(crops)])[0].numpy()


def open_litert(path: str) -> Opened:
    import zipfile

    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(path).get_signature_runner("serving_default")
    with zipfile.ZipFile(path) as archive:  # behind the model
        return archive.read("distill.student.json").decode(), lambda crops: run(images=crops)["logits"]


OPENERS = {".onnx": open_onnx, ".xml": open_openvino, ".pte": open_executorch, ".tflite": open_litert}


def center_crop(image: Image.Image, size: int, crop_ratio: float, interpolation: str) -> np.ndarray:
    """The crop that the student was evaluated on: the shorter side resized to size / crop_ratio, then the centre. uint8 [S,S,3], RGB."""
    is_inverted = image.format == "JPEG" and "adobe" not in image.info
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: its high byte, where Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.mode == "CMYK" and is_inverted:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's inverted one
    if image.has_transparency_data:  # laid on white, as in training
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    short = max(size, round(size / crop_ratio))
    long = short * max(image.size) // min(image.size)
    resized = (long, short) if image.width >= image.height else (short, long)
    left, top = (round((side - size) / 2) * full / side for side, full in zip(resized, image.size, strict=True))
    right, bottom = min(image.width, left + size * image.width / resized[0]), min(image.height, top + size * image.height / resized[1])
    return np.array(image.resize((size, size), Image.Resampling[interpolation.upper()], box=(left, top, right, bottom)))


def main() -> None:
    """Print the classes, the most likely first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--json", action="store_true", help="all logits and probabilities, as JSON")
    args = parser.parse_args()
    opener = OPENERS.get(Path(args.model).suffix)
    if opener is None:
        parser.error(f"{args.model} is none of {', '.join(OPENERS)}")
    said, logits_of = opener(args.model)
    student = json.loads(said)
    how = student["preprocessing"]
    with Image.open(args.image) as image:
        crop = center_crop(image, how["image_size"], how["crop_ratio"], how["interpolation"])
    logits = logits_of(crop[None])[0].astype(np.float64)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    if args.json:
        print(json.dumps({"class_names": student["class_names"], "logits": logits.tolist(), "probs": probs.tolist()}))  # noqa: T201
        return
    for number in np.argsort(-probs)[: args.top]:
        print(f"{probs[number]:7.2%}  {student['class_names'][number]}")  # noqa: T201


if __name__ == "__main__":
    main()
