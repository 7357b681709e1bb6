"""What a run tells: a progress bar for people, events.jsonl for programs."""
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl4mis.errors import not_written
from ssl4mis.records import write_text

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Reporter:
    """Writes the events of a run and shows them.

    On a terminal there is one bar with iterations/s, time left and the loss terms; elsewhere a line now and then.
    Without a file for the events it is silent, as all processes of a run but the first one are.
    """

    def __init__(self, events: Path | None, total: int, title: str):
        self.events, self.total, self.title = events, total, title
        self.console = Console(stderr=True, soft_wrap=True)
        self.bar = self.task = None
        self.spoken = time.monotonic()

    def __enter__(self):
        if self.events and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[terms]}"))
            self.bar = Progress(*columns, console=self.console).__enter__()
            self.task = self.bar.add_task(self.title, total=self.total, terms="")
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.__exit__(*error)

    def say(self, text: str) -> None:
        """One line for people."""
        if self.events:
            (self.bar.console if self.bar else self.console).print(text, highlight=False, markup=False)

    def rewind(self, done: int) -> list[dict]:
        """Drop events after step `done`, which a resumed run will write again; return the training events kept."""
        kept = []
        if not self.events:
            return kept
        if self.events.exists():
            for line in self.events.read_bytes().splitlines():
                try:
                    event = json.loads(line)
                    if event["done"] <= done:
                        kept.append(event)
                except (ValueError, KeyError, TypeError, RecursionError):  # a line cut by a crash
                    continue
        write_text(self.events, "".join(json.dumps(event) + "\n" for event in kept))
        return kept

    def step(self, event: dict) -> None:
        """Log a training event: {"done": steps finished, "rate": iterations/s, loss terms ...}."""
        if not self.events:
            return
        try:
            with open(self.events, "a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise not_written(self.events, error, "; the same command goes on from the last checkpoint") from None
        terms = "  ".join(f"{name} {value:.4f}" for name, value in event["terms"].items())
        text = f"{event['rate']:.2f} it/s  {terms}"
        if self.bar:
            self.bar.update(self.task, completed=event["done"], terms=text)
        elif time.monotonic() - self.spoken > LINE_EVERY:
            self.spoken = time.monotonic()
            left = (self.total - event["done"]) / max(event["rate"], 1e-9)
            self.say(f"{self.title}  {event['done']}/{self.total}  {duration(left)} left  {text}")


def paced(say, verb: str, total: int):
    """A function tell(done, name) that says how far a loop is, at most every LINE_EVERY seconds."""
    started = spoken = time.monotonic()

    def tell(done: int, name: str) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken > LINE_EVERY and done < total:
            spoken = now
            say(f"{verb} {done}/{total} ({name}), {duration((now - started) / done * (total - done))} left")

    return tell


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
