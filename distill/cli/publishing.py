"""An exported teacher goes into the model repository of its run, without undoing what was activated or is being served.

Unit of data: one teacher folder.
"""

from __future__ import annotations

from pathlib import Path

from distill.cli.serving_record import running_service
from export.fingerprint import read_teacher_info
from export.repository_versions import active_version, add_version, version_of
from export.settings import TeacherExportSettings
from export.teacher import TEACHER_FILE, publish_teacher


def publish_exported(folder: Path, repository: Path, settings: TeacherExportSettings) -> str:
    """Publish it and say how.

    A new model, and the version that an earlier export wrote and that is the served one, become this teacher and are served. Where
    somebody has activated another version, or a running service of the run answers as another teacher, it becomes the next version,
    which is not served: whoever activated, or asks the service, must not find another teacher there.

    Args:
        folder: the teacher folder.
        repository: the run's model repository.
        settings: how the teacher is to be run.

    Raises:
        BadInput, ConfigError: see `write_repository` and `add_version`.
    """
    info = read_teacher_info(folder / TEACHER_FILE)
    active = active_version(repository, info.name)
    there = version_of(repository, info.name, info.fingerprint)
    service = running_service(repository)
    taken = active is not None and (active != info.version or (service is not None and service.model == info.name))
    if there is not None and there == active:
        publish_teacher(folder, repository, settings, version=active)
        return f"in {repository}"
    if not taken:
        publish_teacher(folder, repository, settings, replace=True)
        return f"in {repository}"
    if there is None:
        there = add_version(repository, folder, settings.repository)[0].version
    why = f"version {active} was activated"
    if active == info.version and service is not None:
        why = f"the running service (process {service.pid}) answers as another teacher"
    return f"in {repository} as version {there}, which is not served because {why}: distill repository activate {info.name} {there}"
