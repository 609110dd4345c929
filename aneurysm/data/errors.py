"""Errors that a user can act on: one sentence that names the case and the fix."""


class UserError(Exception):
    """Something outside the program is wrong: a path, a file, a setting. The message says what to do."""


class ReadError(UserError, ValueError):
    """A file or a series cannot be read as what it should be.

    The message is one sentence: the file or series, what is wrong with it, and what to do.
    """
