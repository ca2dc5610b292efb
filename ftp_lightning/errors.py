"""The errors that speak to the user."""

from __future__ import annotations

import errno

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class UserError(ValueError):
    """What is wrong, where, and what to do, in at most three lines.

    The command line prints the message on stderr and exits with status 2; a library user sees a ValueError.
    """


class Interrupted(UserError):
    """A UserError that the settings are not to blame for: what was saved stays, and the same command goes on with it
    once the cause is gone."""


def hub_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors of the Hub's client, its own and the base class of its HTTP library, and `more`.

    The client passes on the errors of its HTTP library, which differs by version: so the class is found through it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    library = tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)
    return (*more, HFValidationError, HfHubHTTPError, *library)


def unwritable(error: BaseException | None) -> Interrupted | None:
    """What to say where a disk is full, over its quota, read-only or broken; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
        return None
    where = f" {error.filename}" if error.filename else ""
    return Interrupted(f"cannot write{where}: {error.strerror}\nOnce that is mended the same command goes on.")
