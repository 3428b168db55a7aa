"""Run a distilled student on an image. Needs onnxruntime, numpy and Pillow.

python run_student.py student.int8.onnx photo.jpg [--top 5] [--json]
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def center_crop(image: Image.Image, size: int, crop_ratio: float) -> np.ndarray:
    """The crop that the student was evaluated on: the shorter side resized to size / crop_ratio, then the centre. uint8 [S,S,3], RGB."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:  # laid on white, as in training
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    short = max(size, round(size / crop_ratio))
    long = short * max(image.size) // min(image.size)
    resized = (long, short) if image.width >= image.height else (short, long)
    left, top = (round((side - size) / 2) * full / side for side, full in zip(resized, image.size, strict=True))
    right, bottom = min(image.width, left + size * image.width / resized[0]), min(image.height, top + size * image.height / resized[1])
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def main() -> None:
    """Print the classes, the most likely first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--json", action="store_true", help="all logits and probabilities, as JSON")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    student = json.loads(session.get_modelmeta().custom_metadata_map["distill.student"])
    how = student["preprocessing"]
    with Image.open(args.image) as image:
        crop = center_crop(image, how["image_size"], how["crop_ratio"])
    logits = session.run(["logits"], {"images": crop[None]})[0][0].astype(np.float64)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    if args.json:
        print(json.dumps({"class_names": student["class_names"], "logits": logits.tolist(), "probs": probs.tolist()}))  # noqa: T201
        return
    for number in np.argsort(-probs)[: args.top]:
        print(f"{probs[number]:7.2%}  {student['class_names'][number]}")  # noqa: T201


if __name__ == "__main__":
    main()
