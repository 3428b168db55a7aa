"""Who waits for whom: the seconds that a training loop spent waiting for its next batch, by what the batch was waiting for."""

from __future__ import annotations

from distill.config import Section

ADVICE = {
    "decode": "more data.num_threads or training workers",
    "teacher": "more teacher instances, or labels made ahead with `distill label`",
    "store": "a faster disk for the label store",
}
"""What to scale when the student waits for it."""


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

    def describe(self) -> str:
        """One phrase: how busy the student is and, if it waits much, for whom and what to scale."""
        total = self.decode + self.store + self.teacher + self.student
        if total <= 0:
            return "starting"
        worst = max(ADVICE, key=lambda name: getattr(self, name))
        share = getattr(self, worst) / total
        if share < 0.1:
            return f"student busy {self.student / total:.0%}"
        return f"student busy {self.student / total:.0%}, waits for {worst} {share:.0%} ({ADVICE[worst]})"
