"""Work in several processes, where one that dies costs only its own item, and how far it is."""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, NamedTuple

LINE_EVERY = 30.0  # seconds between lines where there is no terminal
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class Died(NamedTuple):
    """In place of a result: the process that had the item ended, and how."""

    how: str


class Progress:
    """A bar with the time left on a terminal, elsewhere a line now and then."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = self.spoken = time.monotonic()
        self.bar = self.task = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                       progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[item]}"))
            self.bar = progress.Progress(*columns, console=Console(stderr=True, soft_wrap=True)).__enter__()
            self.task = self.bar.add_task(self.title, total=self.total, item="")
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.__exit__(*error)

    def say(self, text: str) -> None:
        """One line for people."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, item: str) -> None:
        """One more item is through."""
        self.done += 1
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, item=item)
        elif now - self.spoken > LINE_EVERY and self.done < self.total:
            self.spoken = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.say(f"{self.title}  {self.done}/{self.total} ({item}), {left / 60:.1f} min left")


def results(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Every item and what `function` gives for it, as they get ready; `Died` where the process ended before.

    `function` is one of a module, and must not raise. Its processes have one thread each. Close the iterator to end
    them. The pools of the standard library do not tell which item a dead process had, and give up all others.
    """
    context = multiprocessing.get_context("spawn")  # the same on every system, and safe with threads
    waiting, crew, leaving = deque(items), {}, []
    try:
        while waiting or crew:
            while waiting and len(crew) < workers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                with _deaf_children():
                    process.start()
                theirs.close()
                crew[ours] = process, _send(ours, waiting.popleft())
            for pipe in connection.wait(list(crew)):
                process, item = crew.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    result = Died(_how(process.exitcode))
                else:
                    if waiting:
                        crew[pipe] = process, _send(pipe, waiting.popleft())
                    else:
                        _send(pipe, None)
                        leaving.append(process)
                yield item, result
    finally:
        for process, _ in crew.values():
            process.terminate()
        for process in (*leaving, *(process for process, _ in crew.values())):
            process.join()


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing on stderr, of the whole process: what C++ code prints besides its errors does not ask Python."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _serve(function: Callable[[Any], Any], pipe: connection.Connection) -> None:
    """A worker: one item after the other until there are no more, or nobody is there to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # libraries print warnings, and h5py on a full disk a traceback, besides the error that `function` tells of
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name in THREADS:
        os.environ[name] = "1"  # before the libraries are loaded: the items are what runs side by side
    with suppress(EOFError, OSError):
        while (item := pipe.recv()) is not None:
            pipe.send(function(item))


def _send(pipe: connection.Connection, item: Any) -> Any:
    with suppress(OSError):  # a process that is dead already is noticed when nothing comes back
        pipe.send(item)
    return item


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C, which would end each with a traceback; their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
