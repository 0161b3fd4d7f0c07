"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Something only the user can put right.

    The message says what is wrong, where (file, field or row) and what to do about it; `main.py` prints it
    without a traceback and exits with 1.
    """
