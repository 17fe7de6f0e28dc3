"""The errors that a user can mend."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, and how to mend it, in one sentence."""


class ConfigError(UserError):
    """A run file or setting that cannot be used; the message names the field, the value and the fix."""


REPORT_BUG = "This is a bug of sae-lens-matryoshka; please report it with the traceback above."
"""What is said of errors that are not a :class:`UserError`."""
