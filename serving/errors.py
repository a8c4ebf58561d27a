"""The ways in which serving says no before a request is admitted."""

from atom.errors import AtomError


class InvalidRequestError(AtomError, ValueError):
    """A request that can never be served as it stands; HTTP 400.

    field  the part of the request that is wrong, as a client spells it: "max_tokens", "prompt"
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(AtomError):
    """A request that could be served, but not now: the queue is at its limit; HTTP 429 with Retry-After."""


class StepFailedError(AtomError):
    """The step that computed a request failed; others may succeed; HTTP 500."""


class EngineDeadError(AtomError):
    """The engine serves nothing any more: repeated steps failed, one is stuck, or it was shut down; HTTP 503."""


class EngineDrainingError(EngineDeadError):
    """The engine finishes what it has and takes nothing new: it is about to stop; HTTP 503."""
