"""The one error a user is meant to read: what is wrong, where, and what to do."""


class UserError(ValueError):
    """Bad input or a bad choice of flags. Scripts print its message without a traceback and exit with status 1."""
