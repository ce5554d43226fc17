"""One root for everything that can go wrong, so that every boundary shows it the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class CollegiumError(Exception):
    """What was wrong and where; `hint` says what to do about it.

    `code` is the machine-readable name that HTTP replies carry, `status` the HTTP status they use, and `retryable` says
    whether the same call may succeed later.
    """

    code = "internal_error"
    status = 500
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class InvalidRequest(CollegiumError):
    """The caller's input is not usable as it is."""

    code = "invalid_request"
    status = 400


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's context, even without history."""

    code = "context_length_exceeded"


class SettingsError(InvalidRequest):
    """A settings file, variable or flag is wrong."""

    code = "invalid_settings"


class UnknownExpert(CollegiumError):
    """No expert has this name."""

    code = "model_not_found"
    status = 404


class UnknownDomain(CollegiumError):
    """The router knows no domain of this name."""

    code = "domain_not_found"
    status = 404


class UnknownJob(CollegiumError):
    """No job has this id."""

    code = "job_not_found"
    status = 404


class NameTaken(CollegiumError):
    """A domain of this name exists already."""

    code = "name_taken"
    status = 409


class ModelUnavailable(CollegiumError):
    """A model could not be fetched, converted or loaded."""

    code = "model_unavailable"
    status = 503
    retryable = True


class RemoteUnavailable(ModelUnavailable):
    """A remote server does not answer, refuses, or answers what cannot be used."""

    code = "remote_unavailable"


class ChecksumMismatch(ModelUnavailable):
    """A fetched file is not the one that was measured; both hashes are in the message."""

    code = "checksum_mismatch"
    retryable = False


class UnsupportedModel(ModelUnavailable):
    """An architecture, adapter feature or file format that is not supported, by name."""

    code = "unsupported_model"
    status = 422
    retryable = False


class ArtifactCorrupt(CollegiumError):
    """A stored artifact is missing or differs from its content hash."""

    code = "artifact_corrupt"


class NoSpace(CollegiumError):
    """The disk is full; nothing half-written is left behind."""

    code = "no_space"
    status = 507
    retryable = True


class Overloaded(CollegiumError):
    """The queue is full."""

    code = "overloaded"
    status = 429
    retryable = True


class GateRefused(CollegiumError):
    """A candidate expert did not beat what is live; the numbers are in the message, and all that was measured in `report`."""

    code = "gate_refused"
    status = 409

    def __init__(self, message: str, *, hint: str | None = None, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = dict(report or {})


class Cancelled(CollegiumError):
    """Somebody asked for the end of what was going on."""

    code = "cancelled"
    status = 409


class DatabaseTooNew(CollegiumError):
    """The registry's database was written by a newer version of this program."""

    code = "database_too_new"
