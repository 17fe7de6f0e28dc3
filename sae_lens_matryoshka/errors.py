"""The error that a user can mend."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, and how to mend it, in one sentence."""


REPORT_BUG = "This is a bug of sae-lens-matryoshka; please report it with the traceback above."
"""What is said of errors that are not a :class:`UserError`."""
