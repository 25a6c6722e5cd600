"""The error that a user can mend."""


class InputError(ValueError):
    """Bad input: the message names the thing, both values and the remedy, in one line.

    The command line prints it as it is and exits with status 2; anything else that escapes is a
    bug of ours and keeps its traceback.
    """
