"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A setting or a file that cannot work; the message is one line that names it and what was expected."""


def not_written(path, error: OSError, rest: str = "") -> UserError:
    """What to say where a file of a run cannot be written: a full disk, a folder without permission."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}), expected a writable folder with space "
                     f"left{rest}")
