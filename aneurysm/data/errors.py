"""The one error that readers raise about a user's data."""


class ReadError(ValueError):
    """A file or series cannot be read as a scan; the message names it, says what is wrong and what to do."""
