"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Says in one line what is wrong, where, and what to do; entry points print it without a traceback."""
