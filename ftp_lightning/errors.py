"""The one error that speaks to the user."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in at most three lines.

    The command line prints the message on stderr and exits with status 2; a library user sees a ValueError.
    """
