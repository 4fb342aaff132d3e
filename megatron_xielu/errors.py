"""The one exception the command line turns into exit code 2."""


class UserError(Exception):
    """The user's input is wrong.

    The message names the offending value, the rule it breaks and the remedy. The command line
    prints it alone, without a traceback, and exits with code 2.
    """
