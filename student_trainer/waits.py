"""Who waits for whom: the seconds that a training loop spent waiting for its next batch, by what the batch was waiting for."""

from __future__ import annotations

from typing import TypedDict

from distill.config import Section

ADVICE = {
    "decode": "more data.num_threads or training workers",
    "teacher": "more teacher instances, or labels made ahead with `distill label`",
    "store": "a faster disk for the label store",
}
"""What to scale when the student waits for it."""

WORTH_SAYING = 0.1
"""Share of the time from which on a wait is spoken of."""

Bottleneck = TypedDict("Bottleneck", {"for": str, "share": float, "scale": str})
"""What is waited for most, its share of the time, and what to scale."""


class Waits(Section):
    """Seconds of one worker."""

    decode: float = 0.0
    """Waited for images to be read, decoded and cropped."""
    store: float = 0.0
    """Waited for labels to be read from the store."""
    teacher: float = 0.0
    """Waited for the teacher's answer."""
    student: float = 0.0
    """Spent on training; nobody waited."""

    def plus(self, name: str, seconds: float) -> Waits:
        """A copy with `seconds` more under `name`."""
        return self.model_copy(update={name: getattr(self, name) + seconds})

    def since(self, earlier: Waits) -> Waits:
        """What was added after `earlier`."""
        return Waits(**{name: getattr(self, name) - getattr(earlier, name) for name in type(self).model_fields})

    @property
    def total(self) -> float:
        """All seconds."""
        return self.decode + self.store + self.teacher + self.student

    def bottleneck(self) -> Bottleneck | None:
        """What the student waits for most, if that is a tenth of the time or more."""
        if self.total <= 0:
            return None
        worst = max(ADVICE, key=lambda name: getattr(self, name))
        share = getattr(self, worst) / self.total
        return {"for": worst, "share": share, "scale": ADVICE[worst]} if share >= WORTH_SAYING else None

    def describe(self) -> str:
        """One phrase: how busy the student is and, if it waits much, for whom and what to scale."""
        if self.total <= 0:
            return "starting"
        busy, worst = f"student busy {self.student / self.total:.0%}", self.bottleneck()
        return busy if worst is None else f"{busy}, waits for {worst['for']} {worst['share']:.0%} ({worst['scale']})"
