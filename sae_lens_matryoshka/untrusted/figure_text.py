"""Text in figures stands as it was given: a name such as ``$_$`` is no formula, which matplotlib would fail to set."""

from functools import partial

from matplotlib import rc_context

text_as_it_stands = partial(rc_context, {"text.parse_math": False, "text.usetex": False})
"""Decorates functions that draw figures."""
