"""A run folder and the stages in it. A stage that is finished with the same settings and inputs is not done twice.

    runs/NAME/
      pretrain/   stage.json + what the stage made
      finetune/   ...
      old/        what was made with other settings; moved aside, never deleted

`stage.json` appears last, by rename, so a folder without one is work in progress that the stage may resume.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import Section, digest_of
from distill.errors import ConfigError, StageMissing

RECORD = "stage.json"
WANTED = "wanted.json"


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    Args:
        run_dir: the run's folder.
        name: folder of the stage.
        settings: everything that its result depends on, plain data.
        inputs: digest of each input (earlier stages, image sets).
        verb: the verb that makes it; by default it has the stage's name.
    """

    run_dir: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    verb: str = ""

    @property
    def folder(self) -> Path:
        """Where the stage's products lie."""
        return self.run_dir / self.name

    @property
    def digest(self) -> str:
        """Names settings and inputs; what later stages take as their input."""
        return digest_of({"settings": self.settings, "inputs": self.inputs})

    def result(self) -> dict[str, Any] | None:
        """What the finished stage said, or None when it is not finished with these settings."""
        record = _read(self.folder / RECORD)
        return record["result"] if record and record["digest"] == self.digest else None

    def require(self) -> dict[str, Any]:
        """The result of a stage that must be there.

        Raises:
            StageMissing: not finished, or finished with other settings (which are named).
        """
        result = self.result()
        if result is not None:
            return result
        record, verb = _read(self.folder / RECORD), self.verb or self.name
        if record is None:
            raise StageMissing(f"{self.folder} is not finished; run `distill {verb}` with this run file first")
        raise StageMissing(
            f"{self.folder} was made with other settings ({difference(record, self._record({}))});"
            f" run `distill {verb}` again with these, or give the same overrides"
        )

    def begin(self) -> Path:
        """The folder to work in. Work in progress with the same settings is kept; anything else is moved to `old/`."""
        wanted = _read(self.folder / WANTED) or _read(self.folder / RECORD)
        if self.folder.exists() and (wanted is None or wanted["digest"] != self.digest):
            self._move_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / RECORD).unlink(missing_ok=True)
        _write(self.folder / WANTED, self._record({}))
        return self.folder

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Mark the stage as done and keep its result (plain data)."""
        _write(self.folder / RECORD, self._record(result))
        (self.folder / WANTED).unlink(missing_ok=True)
        return result

    def forget(self) -> None:
        """Move the stage's folder aside, so that it is made afresh."""
        if self.folder.exists():
            self._move_aside()

    def _record(self, result: dict[str, Any]) -> dict[str, Any]:
        return {"digest": self.digest, "settings": self.settings, "inputs": self.inputs, "finished_at": time.time(), "result": result}

    def _move_aside(self) -> None:
        target = self.run_dir / "old" / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        while target.exists():
            target = target.with_name(target.name + "x")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(str(self.folder), str(target))


def difference(found: dict[str, Any], wanted: dict[str, Any], limit: int = 3) -> str:
    """The first few settings and inputs in which two stage records differ, as `key: found, now wanted`."""
    before, now = (_flat({"": r["settings"], "input": r["inputs"]}) for r in (found, wanted))
    keys = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    said = [f"{key}: {_short(before.get(key))}, now {_short(now.get(key))}" for key in keys[:limit]]
    return "; ".join(said) + ("; ..." if len(keys) > limit else "")


def plain(section: Section) -> dict[str, Any]:
    """Settings as the plain data that a stage is told apart by."""
    return section.model_dump(mode="json")


def prepare_run_dir(run_dir: Path) -> None:
    """Make the run folder.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be made: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"run_dir {run_dir} is not writable; choose another with run_dir=PATH")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list | tuple):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: value}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError:
        return None  # cut off while being written: as good as not there


def _write(path: Path, value: dict[str, Any]) -> None:
    pending = path.with_name(path.name + ".pending")
    pending.write_text(json.dumps(value, indent=1), encoding="utf-8")
    pending.replace(path)
