"""Every error that the project raises on purpose.

DistillError                     exit code 1: a failure of ours or of the machine
├── BadInput                     exit code 2: the user can mend it; one line says what, the limit, the way out
│   ├── ConfigError              run file or override: unknown key, wrong type, value out of range
│   ├── SourceError              images: the path does not exist, is empty, has one class only
│   ├── ImageError               one image that cannot be used; counted and listed, the job goes on
│   ├── TooManyRejected          more unusable images than the configured share
│   ├── StageMissing             a verb needs what an earlier verb makes
│   ├── CheckpointError          a checkpoint that is damaged or of another network
│   ├── ParityError              an exported graph that does not say what the network says
│   ├── FingerprintMismatch      labels, store or checkpoint of another teacher, crop recipe or image set
│   └── RequestRefused           the teacher server was asked for something it cannot do
├── TeacherUnavailable           no answer for now: asking again later is right
│   └── TeacherChanged           another version took its place: ask at once what it is, then again
├── TeacherAnswerError           an answer that must not be used: NaN, wrong shape, wrong teacher
├── TrainingDiverged             no student is left whose loss is finite
├── ServerStartError             a server of ours did not come up
└── StoreError                   the soft-label store cannot be read or written
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C: every block closes what it opened. Not an error of ours; the exit code is 143, not 130."""


class DistillError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class BadInput(DistillError):
    """The user can mend it."""

    exit_code = 2


class ConfigError(BadInput):
    """A run file or an override that says something impossible."""


class SourceError(BadInput):
    """A set of images that cannot be used."""


class ImageError(BadInput):
    """One image that cannot be used. `reason` is a short phrase that the rejection list counts by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooManyRejected(BadInput):
    """The share of unusable images is over the limit."""


class StageMissing(BadInput):
    """The product of an earlier stage is needed and not there."""


class CheckpointError(BadInput):
    """A checkpoint that is damaged or belongs to another network."""


class ParityError(BadInput):
    """The exported graph and the network disagree by more than the limit."""


class FingerprintMismatch(BadInput):
    """Something was made by another teacher, crop recipe or image set."""


class RequestRefused(BadInput):
    """A request that the teacher server understands and will never answer."""


class TeacherUnavailable(DistillError):
    """The teacher gives no answer now. Asking again later is right."""


class TeacherChanged(TeacherUnavailable):
    """Another version took the teacher's place. `info()` says which; whoever may use its labels asks again at once."""


class TeacherAnswerError(DistillError):
    """The teacher answered something that must not be used."""


class TrainingDiverged(DistillError):
    """The loss or the gradient of every student that was still training became infinite or no number."""


class ServerStartError(DistillError):
    """A server did not come up in time."""


class StoreError(DistillError):
    """The soft-label store cannot be read or written."""
