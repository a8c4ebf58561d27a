"""The errors a user can meet. Every message says what came, what is needed and what to do."""


class AtomError(Exception):
    """Base of all errors that Atom raises on purpose."""


class UnsupportedError(AtomError):
    """What was asked for is well formed, but nothing here can do it."""


class CheckpointError(AtomError):
    """A checkpoint on disk is missing, damaged, or not what its header says."""


class CalibrationError(AtomError):
    """Calibration data or statistics cannot be used."""
