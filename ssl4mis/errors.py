"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A setting or a file that cannot work; the message is one line that names it and what was expected."""
