"""What a teacher from elsewhere must have in common with the run that takes it over: the classes in their order, and the size of a crop.

Unit of data: one teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.errors import ConfigError
from distill.teacher_info import Preprocessing


def require_same_classes(found: Sequence[str], wanted: Sequence[str] | None, origin: str) -> None:
    """Refuse a teacher whose classes are not those of the run, in the same order: its labels would mean something else.

    Raises:
        ConfigError: with both numbers, or with the first name that differs.
    """
    if wanted is None or list(found) == list(wanted):
        return
    if len(found) != len(wanted):
        raise ConfigError(f"{origin} has {len(found)} classes, the run has {len(wanted)}: they must be equal (data.class_names)")
    first = next(number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    raise ConfigError(
        f"{origin} calls class {first} {found[first]!r}, the run calls it {wanted[first]!r}:"
        " set data.class_names to the teacher's, or import it again with --classes"
    )


def require_input_size(own: Preprocessing, input_size: int | None, travels: int, origin: str) -> None:
    """Refuse crops that are neither of the network's own size nor of the one that the graph is to resize from.

    Args:
        own: of the network.
        input_size: `teacher.input_size`.
        travels: `data.image_size`.
        origin: where the network comes from.

    Raises:
        ConfigError: with the sizes.
    """
    if input_size is None:
        require_same_size(own, travels, origin)
    elif input_size != travels:
        raise ConfigError(f"teacher.input_size is {input_size}, data.image_size is {travels}: both are the size of the crops that travel")


def require_same_size(found: Preprocessing, image_size: int | None, origin: str) -> None:
    """Refuse a teacher that sees crops of another size than the run cuts.

    Raises:
        ConfigError: with both sizes.
    """
    if image_size is not None and found.image_size != image_size:
        raise ConfigError(
            f"{origin} sees crops of {found.image_size} pixels, data.image_size is {image_size}: they must be equal;"
            f" or set teacher.input_size={image_size}, and the graph resizes what travels to its own size"
        )
