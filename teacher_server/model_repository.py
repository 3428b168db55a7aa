"""Which file of a Triton model repository is the served one; a teacher in this process must be the one that Triton would load.

Flow: <repository>/<name>/config.pbtxt -> version -> <repository>/<name>/<version>/model.onnx. Unit of data: one model.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.errors import RequestRefused, StageMissing


def served_model(repository: Path, name: str) -> Path:
    """The file of the version that Triton serves by default: the highest that the version policy allows.

    Raises:
        StageMissing: no such model, or no such version of it.
        RequestRefused: its `config.pbtxt` cannot be read.
    """
    folder = repository / name
    versions = {int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()} if folder.is_dir() else set()
    allowed = _allowed_versions(folder / "config.pbtxt")
    if allowed is not None:
        versions &= allowed
    if not versions:
        raise StageMissing(f"model repository {repository} holds no served version of {name!r}; make it with `distill export-teacher`")
    return folder / str(max(versions)) / "model.onnx"


def _allowed_versions(path: Path) -> set[int] | None:
    """The versions that a configuration names; None when it leaves the choice open."""
    if not path.is_file():
        return None
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RequestRefused(f"{path} is no Triton model configuration: {' '.join(str(error).split())}") from error
    named = config.version_policy.specific.versions
    return set(named) if named else None
