"""The exceptions whose text is for the user: shown as it is, without a traceback."""


class UserError(Exception):
    """The user's input is wrong.

    The message names the offending value, the rule it breaks and the remedy. The command line
    prints it alone, without a traceback, and exits with code 2.
    """


class SharedUserError(UserError):
    """One that all ranks of a run raise with the same text, so that rank 0 alone says it."""


class UnhealthyRun(Exception):
    """A run went wrong in a way that it noticed itself, on all ranks at once.

    The message says what was found and what to do, the same on every rank; the exit code is 1.
    """
