"""One process at a time in the folder of a run. The system takes the lock back however a process ends."""
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl4mis.errors import UserError, not_written

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "lock"  # stays when the run is over: without it two processes could hold the locks of two files of that name


@contextmanager
def alone(folder: Path, run: str, say=print) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made; UserError naming the process that has it.

    Says so where the file system has no locks, and goes on.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise not_written(path, error) from None
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "that of no known number"
            raise UserError(f"run {run}: another process is at it ({holder}), expected none; the same command goes on "
                            "when that one has ended") from None
        except OSError as error:
            say(f"{path}: no lock ({error.strerror}); expected no other process at this run")
        try:
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            raise not_written(path, error) from None
        yield
