"""The one family of errors a user meets: each says what is wrong, where, and how to mend it."""

from typing import ClassVar


class FtError(Exception):
    """An error a person can act on.

    Args:
        what: The fact, in one sentence without a trailing full stop.
        where: File and line, asset and partition, or request field the fact belongs to.
        mend: What to do about it, as an instruction.
    """

    code: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.mend}" if self.mend else text


class SpecError(FtError):
    """A task or recipe file does not say what the platform needs."""

    code = "invalid_spec"


class SourceError(FtError):
    """Rows could not be read from their source."""

    code = "invalid_source"


class DataError(FtError):
    """The rows were read but cannot be used as asked."""

    code = "invalid_data"


class ArtefactError(FtError):
    """A stored artefact is missing, damaged, or could not be published."""

    code = "artefact"


class BackupError(FtError):
    """A backup could not be made, is damaged, or cannot be restored there."""

    code = "backup"


class TrainingError(FtError):
    """Training ended without an adapter."""

    code = "training_failed"


class OutOfMemory(TrainingError):
    """Training needed more memory than there is.

    Args:
        used: Bytes in use when it ended; 0 when nobody measured them.
        total: Bytes there are; 0 when unknown.
    """

    code = "out_of_memory"

    def __init__(self, what: str, *, where: str = "", mend: str = "", used: int = 0, total: int = 0) -> None:
        super().__init__(what, where=where, mend=mend)
        self.used, self.total = used, total


class PluginError(FtError):
    """A plug-in trainer failed, or what it made is not what its interface promises."""

    code = "plugin_failed"


class EvaluationError(FtError):
    """Evaluation ended without a report."""

    code = "evaluation_failed"


class GateRefusal(FtError):
    """A release was refused by the gates or by the identity of what it was asked to release."""

    code = "release_refused"


class ServiceError(FtError):
    """The prediction service could not be built, started or asked."""

    code = "service"


class RequestError(FtError):
    """A request the prediction service refuses.

    Args:
        error_code: Stable machine-readable name, part of the HTTP protocol.
        status: The HTTP status it is answered with.
        retry_after: Seconds after which it is worth asking again; None where that would not help.
        field: Name of the request field it is about, for programs; `what` names it for people.
    """

    def __init__(
        self,
        error_code: str,
        what: str,
        *,
        status: int = 400,
        mend: str = "",
        retry_after: int | None = None,
        field: str = "",
    ) -> None:
        super().__init__(what, mend=mend)
        self.error_code, self.status, self.retry_after, self.field = error_code, status, retry_after, field
