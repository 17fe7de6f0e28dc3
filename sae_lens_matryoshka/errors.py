"""The error that a user can mend."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, and how to mend it, in one sentence."""
