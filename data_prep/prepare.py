"""From an archive as downloaded to a prepared data set: cases, manifest, folds, summary and contact sheet.

    python -m data_prep.prepare LA --raw DIR --out DATA
    python -m data_prep.prepare LA --from-h5 DIR --out DATA        the files that the field published
    python -m data_prep.prepare my_data --raw DIR|CSV --out DATA   own scans: dataset.json and imagesTr, or a CSV

It writes DATA/<name>/<recipe>. Stop it at any time: the same command goes on, and a finished data set is only checked.
Exit status: 0 done, 1 some cases are bad (listed at the end), 2 nothing can be done, 130 stopped.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import statistics
import sys
import time
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import data_prep
from data_prep import parallel
from data_prep.spec import DataError, Protocol, ids_sha256, load_split

if typing.TYPE_CHECKING:
    from data_prep.geometry import Geometry
    from data_prep.raw import Archive, H5Case, RawCase
    from data_prep.recipes import Stored
    from data_prep.scans import Scan
    from data_prep.summary import Tile

Fold = Mapping[str, Sequence[str]]  # "train", "test" and, for own data, "extra"

SCHEMA = 1  # of manifest and summary
SAVE_EVERY = 2.0  # seconds between two versions of the manifest: at most so much work is lost when killed
MOST_WORKERS = 8  # by default: each may hold a whole CT several times
CARD, MANIFEST, SPLITS = "dataset.json", "manifest.json", "splits/cv5.json"
WRITTEN = (CARD, MANIFEST, SPLITS, "splits_final.json", "summary.json", "summary.md", "contact_sheet.png")
OWN_LAYOUT = "a folder with dataset.json, imagesTr and labelsTr, or a CSV of paths"


@dataclass(frozen=True)
class Job:
    """All that a worker knows of a case: `before` is its entry in the manifest, `shown` whether the contact sheet has
    a place for it."""

    case: "RawCase | H5Case"
    archive: "Archive"  # without the other cases
    folder: Path
    root: Path
    dtype: str
    compression: str | None
    before: Mapping[str, Any] | None
    shown: bool

    @property
    def path(self) -> Path:
        """File of the stored case."""
        return self.folder / _file(self.case.id)

    @property
    def settings(self) -> str:
        """Hash of all that, beside the input files, the stored case depends on."""
        reading = {name: getattr(self.case, name, None) for name in ("volume", "channels", "axes", "spacing")}
        reading |= {"values": sorted(self.case.values.items())}
        reading |= {"align": getattr(getattr(self.case, "align", None), "__qualname__", None)}
        content = [SCHEMA, self.archive.recipe.to_dict(), self.archive.modalities, self.archive.classes, self.dtype,
                   self.compression, reading]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Prepared(NamedTuple):
    """A case that is in the store: its entry in the manifest and in the summary, and its planes if it is shown."""

    entry: Mapping[str, Any]
    facts: dict[str, Any]
    tile: "Tile | None"
    kept: bool


class Bad(NamedTuple):
    """A case that cannot be used, in one line; `stop` says that no other could be written either."""

    line: str
    stop: bool = False


class _CannotWriteError(DataError):
    """No permission, no space: no other case would fare better."""


def prepare(
    archive: "Archive",
    folder: Path,
    root: Path,
    workers: int = 1,
    dtype: str = "float32",
    compression: str | None = None,
    progress: parallel.Progress | None = None,
    replace_others: bool = False,
) -> list[str]:
    """Write all cases of an archive to a folder, with manifest, folds, summary and card; one line per bad case.

    `root` is the folder that the input files are named from. What is there already, from the same files by the same
    recipe and unchanged, is kept. Raises DataError where the folder holds something else or cannot be written, and,
    without `replace_others`, where it holds cases of another source or cases that are not in this archive.
    """
    progress = progress or parallel.Progress(archive.name, len(archive.cases))
    missing = [] if _is_own(archive) else _missing(archive)
    _claim(folder)
    with _alone(folder):
        ledger = _Ledger(archive, folder, dtype, compression, replace_others)
        jobs = _jobs(ledger, root, dtype, compression)
        try:
            _process(jobs, workers, ledger, progress)
        finally:
            ledger.sweep()
            ledger.save()
        same = _same_scans(ledger)
        if ledger.done:
            for remark in _finish(ledger, root, same, missing):
                progress.say(f"{archive.name}: {remark}")
            kept = sum(case.kept for case in ledger.done.values())
            found = f"{len(ledger.done)} of {len(archive.cases)} cases are in {folder}"
            progress.say(f"{archive.name}: {found}" + (f", {kept} as before" if kept else ""))
            train = not _is_own(archive) or (folder / SPLITS).exists()
            progress.say(f"{archive.name}: look at contact_sheet.png there"
                         + (f", then train with --dataset {folder}" if train else ""))
        else:
            ledger.leave()
    return list(ledger.bad_in_order().values())


def find_archive(name: str, raw: Path | None, from_h5: Path | None, recipe: str | None) -> tuple["Archive", Path]:
    """The archive of a built-in data set or of own data, and the folder that its files are named from.

    Raises DataError for an unknown name or recipe and for a folder that is not that archive.
    """
    from data_prep.raw import check_name

    place = (raw or from_h5).expanduser()
    check_name(place)
    built_in = {known.lower(): known for known in data_prep.names() if not known.startswith("phantom")}
    if name.lower() in built_in:
        if not place.is_dir():
            raise DataError(f"{place}: {'a file' if place.exists() else 'no such folder'}, expected the folder of the "
                            f"{built_in[name.lower()]} archive")
        return _built_in(built_in[name.lower()], place, bool(from_h5), recipe), place
    near = difflib.get_close_matches(name.lower(), built_in, n=1)
    own = place.is_file() or any(any(place.glob(pattern)) for pattern in ("dataset.json", "imagesTr", "*.csv"))
    if near and not own:
        raise DataError(f"data set {name!r} is unknown, did you mean {built_in[near[0]]!r}? (own data: {OWN_LAYOUT})")
    if from_h5:
        raise DataError(f"--from-h5 for {name!r}, expected one of {', '.join(built_in.values())} or, for own data, "
                        f"--raw with {OWN_LAYOUT}")
    from data_prep import owndata
    from data_prep.store import NAME

    if not re.fullmatch(NAME, name) or name.lower().startswith("phantom"):
        raise DataError(f"data set {name!r}, expected a name of letters, digits, - and _ that is not taken")
    archive = owndata.archive(name, place)
    if recipe not in (None, archive.recipe.name):
        raise DataError(f"recipe {recipe!r} is unknown for own data, expected {archive.recipe.name}")
    return archive, place if place.is_dir() else place.parent


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parse(argv)
    try:
        archive, root = find_archive(args.dataset, args.raw, args.from_h5, args.recipe)
        kind = archive.replay if archive.source == "h5" else archive.recipe
        folder = args.out.expanduser() / archive.name / kind.name
        with parallel.Progress(archive.name, len(archive.cases)) as progress:
            bad = prepare(archive, folder, root, args.workers, args.dtype, args.compress, progress, args.replace)
    except DataError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a folder without permission, before any case is opened
        print(f"prepare: error: {error.filename or args.out}: {error.strerror}, expected access to it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if bad:
        count = f"{len(bad)} of {len(archive.cases)} cases {'is' if len(bad) == 1 else 'are'} bad:"
        print(count, *bad, sep="\n  ", file=sys.stderr)
    return 1 if bad else 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"prepare: error: {message}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, text = __doc__.partition("\n")
    parser = _Parser(prog="python -m data_prep.prepare", description=summary, epilog=text,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    built_in = ", ".join(name for name in data_prep.names() if not name.startswith("phantom"))
    parser.add_argument("dataset", help=f"{built_in}, or a name of your own")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--raw", type=Path, metavar="DIR|CSV", help="the archive as downloaded, or own data")
    source.add_argument("--from-h5", type=Path, metavar="DIR", help="the h5 files that the field published")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(os.environ.get("SSL4MIS_DATA") or "data"),
                        help="folder of the prepared data sets (default: SSL4MIS_DATA, else data)")
    parser.add_argument("--recipe", help="paper: what the published files contain; clean: no label is used "
                        "(default: paper where there is one)")
    parser.add_argument("--workers", type=_count, metavar="N", default=min(_cores(), MOST_WORKERS),
                        help="cases at a time; each takes memory (default: one per core, at most %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored images")
    parser.add_argument("--replace", action="store_true", help="remove prepared cases that are not in this archive")
    parser.add_argument("--compress", choices=("lzf",), help="smaller files, slower crops (default: none)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 1")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _built_in(name: str, place: Path, h5: bool, recipe: str | None) -> "Archive":
    from data_prep.raw import Archive
    from data_prep.recipes import Recipe

    module, spec = data_prep.module(name), data_prep.dataset(name)
    known = module.RECIPES
    wanted = recipe or ("paper" if "paper" in known else next(iter(known)))
    if wanted not in known:
        raise DataError(f"recipe {wanted!r} is unknown for {name}, expected {' or '.join(known)}")
    if not h5:
        cases = module.raw_cases(place)
        done = replay = known[wanted]
    else:
        if not hasattr(module, "h5_cases"):
            raise DataError(f"--from-h5 for {name}: no h5 files of it were published, expected --raw")
        if wanted != "paper":
            raise DataError(f"--from-h5 with recipe {wanted!r}, expected paper, which the published files follow")
        cases, replay = module.h5_cases(place), known["paper"]
        done = Recipe(name, "published", 1, "The published files as they are: " + replay.about, orientation=None)
    if not cases:
        raise DataError(f"{place}: no case of {name}, expected {spec.how_to_get}")
    own_classes = h5 and hasattr(module, "H5_CLASSES")
    return Archive(
        name=name,
        title=spec.title,
        modality=spec.modality,
        modalities=module.H5_MODALITIES if h5 and hasattr(module, "H5_MODALITIES") else spec.modalities,
        classes=module.H5_CLASSES if own_classes else spec.classes,
        regions={} if own_classes else spec.regions,
        citation=spec.citation,
        source="h5" if h5 else "raw",
        spacing_known=not h5 or getattr(module, "H5_SPACING_KNOWN", True),
        cases=tuple(cases),
        recipe=done,
        replay=replay,
    )


def _is_own(archive: "Archive") -> bool:
    return archive.name not in data_prep.names()


# The folder: what is there, what may be touched.


def _claim(folder: Path) -> None:
    """Make the folder. Raises DataError where it cannot be, or holds what is no prepared data set."""
    try:
        _check_ours(folder)
        (folder / "cases").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be used ({error.strerror}), expected a writable place: --out DIR") from None


def _check_ours(folder: Path) -> None:
    """Raises DataError where the folder holds what this command did not write."""
    inside = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".") if folder.is_dir() else []
    begun = inside == ["cases"] and not any((folder / "cases").iterdir())
    if inside and not begun and MANIFEST not in inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        raise DataError(f"{folder}: holds {', '.join(inside[:3])}{more}, expected nothing or a prepared data set")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises DataError where another process prepares the same folder."""
    try:
        import fcntl
    except ImportError:  # Windows: two at a time are not noticed there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process prepares it, expected one at a time") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


class _Ledger:
    """What is in the folder and what became of the cases; only files that the manifest names are ever removed."""

    def __init__(
        self, archive: "Archive", folder: Path, dtype: str, compression: str | None, replace_others: bool
    ) -> None:
        """Raises DataError for a damaged manifest, one of other cases and where none can be written."""
        self.archive, self.folder = archive, folder
        self.done: dict[str, Prepared] = {}
        self.bad: dict[str, str] = {}
        self.sweep()
        self.head = {"schema": SCHEMA, "name": archive.name, "source": archive.source,
                     "recipe": archive.recipe.to_dict(), "dtype": dtype, "compression": compression}
        before = self._read()
        self.entries: dict[str, Mapping[str, Any]] = before.pop("cases")
        others = sorted(set(self.entries) - {case.id for case in archive.cases})
        if not replace_others:
            self._refuse_others(before.get("source"), others)
        if before != self.head:
            _remove(folder, CARD)  # until all cases are of one kind, there is no data set to open
        for case in others:
            self.drop(case)
        self.save()

    def _refuse_others(self, source: str | None, others: Sequence[str]) -> None:
        """Raises DataError where cases would be lost that this archive does not have, or not in this form."""
        options = {"h5": "--from-h5", "raw": "--raw"}
        if self.entries and source != self.archive.source:
            raise DataError(f"{self.folder}: holds {len(self.entries)} cases made with {options.get(source, source)}, "
                            f"expected another --out for {options[self.archive.source]}, or --replace")
        if others:
            raise DataError(f"{self.folder}: holds {len(self.entries)} cases, {len(others)} of them are not in this "
                            f"archive, the first is {others[0]}; expected all of them, another --out, or --replace to "
                            "remove them")

    def _read(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            return {"cases": {}}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            name = found["name"]
            sound = all(_is_plain(case) and entry["output"]["file"] == _file(case) and entry["output"]["sha256"]
                        and entry["inputs"] and entry["settings"] and entry["image"] and entry["left_out"] >= 0
                        for case, entry in found["cases"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise DataError(f"{path}: damaged, expected what this command wrote; remove {self.folder} to begin anew")
        if name != self.archive.name:
            raise DataError(f"{self.folder}: holds the data set {name}, expected {self.archive.name} or nothing")
        return found

    def save(self) -> None:
        """Write the manifest."""
        from data_prep.store import write_json

        cases = {case: self.entries[case] for case in sorted(self.entries)}
        write_json(self.folder / MANIFEST, self.head | {"cases": cases})

    def put(self, case: str, prepared: Prepared) -> None:
        """A case that is in the store."""
        self.done[case] = prepared
        self.entries[case] = prepared.entry

    def reject(self, case: str, line: str) -> None:
        """A case that is bad, and why in one line."""
        self.bad[case] = line
        self.drop(case)

    def drop(self, case: str) -> None:
        """Forget a case and remove its file."""
        self.done.pop(case, None)
        if self.entries.pop(case, None):
            _remove(self.folder, _file(case))

    def bad_in_order(self) -> dict[str, str]:
        """The lines of the bad cases, in the order of the archive."""
        return {case: self.bad[case] for case in self._ids() if case in self.bad}

    def done_in_order(self) -> dict[str, Prepared]:
        """The cases that are in the store, in the order of the archive."""
        return {case: self.done[case] for case in self._ids() if case in self.done}

    def _ids(self) -> list[str]:
        return list(dict.fromkeys(case.id for case in self.archive.cases))

    def sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for place in (self.folder, self.folder / "cases", self.folder / "splits"):
            for temporary in place.glob(".*.tmp"):
                with suppress(OSError):
                    temporary.unlink()

    def leave(self) -> None:
        """Take away all that this command writes, and the folders if they are empty then."""
        for name in WRITTEN:
            _remove(self.folder, name)
        for place in (self.folder / "cases", self.folder / "splits", self.folder, self.folder.parent):
            with suppress(OSError):
                place.rmdir()


def _remove(folder: Path, name: str) -> None:
    with suppress(FileNotFoundError):
        (folder / name).unlink()


def _file(case: str) -> str:
    return f"cases/{case}.h5"


def _is_plain(case: str) -> bool:
    return bool(case) and case.isprintable() and not case.startswith(".") and not re.search(r"[/\\]", case)


# The cases, several at a time.


def _jobs(ledger: _Ledger, root: Path, dtype: str, compression: str | None) -> list[Job]:
    """The cases to go through, without those that are bad before a file is opened."""
    from data_prep import summary

    good = {}
    for case in ledger.archive.cases:
        if case.id in good or case.id in ledger.bad:
            good.pop(case.id, None)
            ledger.reject(case.id, f"{case.id}: two cases of that name, expected every name once")
        elif case.problem:
            ledger.reject(case.id, case.problem)
        elif not _is_plain(case.id):
            ledger.reject(case.id, f"{case.id!r}: no file can have that name, expected letters, digits, - and _")
        else:
            good[case.id] = case
    shown = set(summary.chosen(list(good)))
    bare = replace(ledger.archive, cases=(), folds=None)
    return [Job(case, bare, ledger.folder, root, dtype, compression, ledger.entries.get(case.id), case.id in shown)
            for case in good.values()]


def _process(jobs: Sequence[Job], workers: int, ledger: _Ledger, progress: parallel.Progress) -> None:
    """Go through the cases; the manifest is saved now and then."""
    progress.done = len(ledger.bad)
    saved = time.monotonic()
    with closing(parallel.results(_outcome, jobs, workers)) as outcomes:  # whatever happens, no worker is left behind
        for job, outcome in outcomes:
            name = job.case.id
            match outcome:
                case Prepared():
                    ledger.put(name, outcome)
                case Bad(line, stop=True):
                    raise DataError(line)
                case Bad(line):
                    ledger.reject(name, line)
                case parallel.Died(how):
                    ledger.reject(name, f"{name}: the process that prepared it was lost ({how}), expected it to end; "
                                        "where memory is short, fewer --workers help")
            progress.step(name)
            if time.monotonic() - saved > SAVE_EVERY:
                ledger.save()
                saved = time.monotonic()


def _outcome(job: Job) -> Prepared | Bad:
    try:
        return _prepare_case(job)
    except _CannotWriteError as error:
        return Bad(str(error), stop=True)
    except DataError as error:
        return Bad(str(error))
    except MemoryError:
        return Bad(f"{job.case.id}: out of memory, expected more of it or fewer --workers")
    except Exception as error:  # one case must not end the others, whatever it is
        return Bad(f"{job.case.id}: {type(error).__name__}: {' '.join(str(error).split())}")


def _prepare_case(job: Job) -> Prepared:
    """Keep the stored case or make it, then read it back, so that what is told of it is what is in the file."""
    from data_prep import store, summary
    from data_prep.recipes import apply

    case, archive = job.case, job.archive
    inputs = sorted((_input(file, job.root) for file in case.files), key=lambda entry: entry["file"])
    stored = _kept(job, inputs)
    kept, entry = stored is not None, job.before
    if not kept:
        image, label = case.read(len(archive.classes))
        if len(image.voxels) != len(archive.modalities):
            raise DataError(f"{image.path}: {len(image.voxels)} channels, expected {len(archive.modalities)}: "
                            f"{', '.join(archive.modalities)}")
        scan = _scan_hash(image.voxels)
        made = apply(archive.recipe, image, label)
        left_out = _left_out(label, made.geometry) if label else 0
        del image, label  # a CT is large
        output = {"file": _file(case.id), "sha256": _write(job, made)}
        entry = {"inputs": inputs, "image": scan, "settings": job.settings, "output": output, "left_out": left_out}
        del made
        stored = store.read_stored(job.path)
    facts = {name: value for name in ("patient", "group") if (value := getattr(case, name))}
    facts |= summary.facts(stored, archive.modalities, archive.classes)
    return Prepared(entry, facts, summary.tile(case.id, stored) if job.shown else None, kept)


def _left_out(label: "Scan", geometry: "Geometry") -> int:
    """Labeled voxels of the scan that are not in the box of the stored case."""
    import numpy as np

    from data_prep.geometry import to_store

    inside = to_store(label, replace(geometry, stored=geometry.cropped), order=0)
    return int(np.count_nonzero(label.voxels) - np.count_nonzero(inside))


def _write(job: Job, made: "Stored") -> str:
    """Write a case; returns its checksum. Raises DataError for what is wrong with it, and where none can be written."""
    from data_prep.store import write_stored

    path, archive = job.path, job.archive
    try:
        return write_stored(path, made, archive.recipe.id, archive.modalities, job.dtype, job.compression)
    except (DataError, RuntimeError) as error:
        # h5py has many words for a full disk, as OSError, which the writer turns into a DataError, or as RuntimeError
        cause = error if isinstance(error, RuntimeError) else error.__context__
        if not isinstance(cause, OSError | RuntimeError):
            raise
        found = re.search(r"error message = '([^']+)'", str(cause))
        reason = found[1] if found else getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise _CannotWriteError(f"{path}: cannot be written ({reason}), expected a writable place with space") from None


def _kept(job: Job, inputs: Sequence[Mapping[str, Any]]) -> "Stored | None":
    """The stored case, if inputs, settings and content are those of the manifest."""
    from data_prep.store import attribute, read_stored
    from data_prep.volumes import open_h5

    before = job.before
    if before is None or (before["inputs"], before["settings"]) != (inputs, job.settings):
        return None
    try:
        with open_h5(job.path) as file:
            stated = attribute(file, job.path, "sha256")
        return read_stored(job.path) if stated == before["output"]["sha256"] else None
    except DataError:  # gone or damaged: it is made again
        return None


def _input(file: Path, root: Path) -> dict[str, Any]:
    """Name from the root, size and checksum of an input file. Raises DataError where it cannot be read."""
    try:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}), expected a file of the case") from None
    name = Path(os.path.relpath(file, root)).as_posix()
    return {"file": name, "bytes": size, "sha256": digest.hexdigest()}


def _scan_hash(voxels) -> str:
    """Of the values of a scan (channels, i, j, k), whatever their type in the file."""
    import numpy as np

    digest = hashlib.sha256(f"{voxels.shape}".encode())
    digest.update(np.ascontiguousarray(voxels, "<f4").reshape(-1))
    return digest.hexdigest()


# All cases together.


def _same_scans(ledger: _Ledger) -> list[list[str]]:
    """Groups of cases with equal voxels; of own data the first with a label stays, and the others are bad.

    Published case lists have scans twice, so those of a known archive are only told.
    """
    groups: dict[str, list[str]] = {}
    for case, prepared in ledger.done_in_order().items():
        groups.setdefault(prepared.entry["image"], []).append(case)
    same = [group for group in groups.values() if len(group) > 1]
    if not _is_own(ledger.archive):
        return same
    labeled = {case.id for case in ledger.archive.cases if case.label}
    for group in same:
        first, *others = sorted(group, key=lambda case: case not in labeled)
        for case in others:
            ledger.reject(case, f"{case}: the same scan as {first}, expected every scan once")
    ledger.save()
    return []


def _missing(archive: "Archive") -> list[str]:
    """A line on what the archive lacks of the case lists, for all lists that lack the same."""
    spec, have = data_prep.dataset(archive.name), {case.id for case in archive.cases}
    lacking: dict[tuple[str, ...], dict[str, int]] = {}
    for name in dict.fromkeys(protocol.split for protocol in spec.protocols.values()):
        listed = {case for fold in _folds(name, spec.splits) for part in (fold["train"], fold["test"]) for case in part}
        lacking.setdefault(tuple(sorted(listed - have)), {})[name] = len(listed)
    return [f"{max(names.values())} cases are listed in {', '.join(names)}, {len(ids)} of them are not here, "
            f"the first is {ids[0]}" for ids, names in lacking.items() if ids]


def _folds(name: str, splits: Path) -> list[Fold]:
    first = load_split(name, 0, splits)
    folds = [first, *(load_split(name, fold, splits) for fold in range(1, first.folds))]
    return [{"train": list(fold.train), "test": list(fold.test)} for fold in folds]


def _finish(
    ledger: _Ledger, root: Path, same: Sequence[Sequence[str]], missing: Sequence[str]
) -> list[str]:
    """Write folds, summary, contact sheet and at last the card; returns the lines on what to look at."""
    from data_prep import store, summary
    from data_prep.volumes import whole_file

    archive, folder, done = ledger.archive, ledger.folder, ledger.done_in_order()
    facts = {case: prepared.facts for case, prepared in done.items()}
    spacing = [statistics.median(entry["spacing"][axis] for entry in facts.values()) for axis in range(3)]
    folds, per_patient, trouble = _folds_of(archive, list(done))
    _write_folds(archive, folder, folds, per_patient, set(done))
    protocols = _protocols(archive, facts, folds, per_patient)
    first = next(iter(protocols.values()), None)
    default = next((protocol for protocol in protocols.values() if protocol.recipe == archive.replay.name), first)
    groups = [entry["group"] for entry in facts.values() if "group" in entry]
    found = {"schema": SCHEMA, "name": archive.name, "title": archive.title, "recipe": archive.recipe.id}
    found |= summary.summarize(facts, same, default)
    found |= {
        "groups": {group: groups.count(group) for group in sorted(set(groups))},
        "notes": [*(case.note for case in archive.cases if case.id in done and case.note), *missing, *trouble,
                  *_cut({case: prepared.entry["left_out"] for case, prepared in done.items()})],
        "bad": {case: line.replace(f"{root}{os.sep}", "") for case, line in ledger.bad_in_order().items()},
        "by_case": facts,
    }
    store.write_json(folder / "summary.json", found)
    with whole_file(folder / "summary.md") as temporary:
        temporary.write_text(summary.markdown(found), encoding="utf-8", errors="backslashreplace", newline="\n")
    tiles = [prepared.tile for prepared in done.values() if prepared.tile]
    note = f" of {archive.modalities[0]}" if archive.modalities[1:] else ""
    note += f"; {len(tiles)} of {len(done)} cases, evenly chosen" if len(tiles) < len(done) else ""
    title = f"{archive.title}: {archive.recipe.id}, {summary.plural(len(done))}"
    with parallel.hushed():  # matplotlib warns of letters that its font lacks
        summary.contact_sheet(folder / "contact_sheet.png", tiles, title, archive.classes, spacing, note)
    store.write_card(folder, {
        "schema": store.SCHEMA, "name": archive.name, "title": archive.title, "modality": archive.modality,
        "modalities": archive.modalities, "classes": archive.classes, "regions": dict(archive.regions),
        "citation": archive.citation, "source": archive.source, "spacing": spacing,
        "spacing_known": archive.spacing_known, "label_guided": archive.replay.label_guided,
        "recipe": archive.recipe.to_dict(), "replay": archive.replay.to_dict(),
        "protocols": {name: asdict(protocol) for name, protocol in protocols.items() if folds and _is_own(archive)},
    })
    return summary.remarks(found)


def _cut(left_out: Mapping[str, int]) -> list[str]:
    """A line on labeled voxels that are not in the boxes of the stored cases, if there are any."""
    worst = max(left_out, key=left_out.get)
    count = sum(number > 0 for number in left_out.values())
    return [f"the box of the recipe leaves out labeled voxels of {count} of {len(left_out)} cases, most of them "
            f"{left_out[worst]} voxels of {worst}"] if count else []


def _folds_of(archive: "Archive", ids: Sequence[str]) -> tuple[list[Fold], int, list[str]]:
    """Five folds, or those of own data; how many cases a patient has in them; a line where there are none."""
    if not _is_own(archive):
        spec = data_prep.dataset(archive.name)
        return (_folds(spec.protocols["cv5"].split, spec.splits) if "cv5" in spec.protocols else []), 1, []
    from data_prep import owndata

    try:
        folds = owndata.folds(archive, ids)
    except DataError as error:  # the cases are prepared all the same, to look at and to predict
        return [], 1, [f"no folds to train on: {error}"]
    return folds, owndata.per_patient(archive, folds), []


def _protocols(
    archive: "Archive", facts: Mapping[str, Mapping[str, Any]], folds: Sequence[Fold], per_patient: int
) -> dict[str, Protocol]:
    if not _is_own(archive):
        return data_prep.dataset(archive.name).protocols
    from data_prep import owndata

    shapes = [tuple(entry["shape"]) for entry in facts.values()]
    spacings = [tuple(entry["spacing"]) for entry in facts.values()]
    labeled = min((len(fold["train"]) // per_patient for fold in folds), default=0)
    return owndata.protocols(shapes, spacings, labeled, archive.classes)


def _write_folds(
    archive: "Archive", folder: Path, folds: Sequence[Fold], per_patient: int, known: Collection[str]
) -> None:
    """splits_final.json as nnU-Net reads it, of the cases that are there; for own data also our own split file."""
    from data_prep.store import write_json

    _remove(folder, SPLITS)
    if _is_own(archive) and folds:
        write_json(folder / SPLITS, _split(archive, folds, per_patient))
    write_json(folder / "splits_final.json", [
        {name: [case for case in fold[part] if case in known] for name, part in (("train", "train"), ("val", "test"))}
        for fold in folds])


def _split(archive: "Archive", folds: Sequence[Fold], per_patient: int) -> dict[str, Any]:
    """Folds of own data as `load_split` reads them."""
    rule = "splits_final.json or the column fold of the data set" if archive.folds else "the rule of data_prep.owndata"
    content = {"name": "cv5", "dataset": archive.name, "about": f"{len(folds)} folds of {archive.name}",
               "source": rule, "per_patient": per_patient, "folds": []}
    for fold in folds:
        parts = {part: list(fold[part]) for part in ("train", "test", "extra") if part != "extra" or fold.get(part)}
        content["folds"].append(parts | {f"sha256_{part}": ids_sha256(ids) for part, ids in parts.items()})
    return content


if __name__ == "__main__":
    # by its name: what workers send back belongs to the module, not to __main__
    from data_prep import prepare as module

    sys.exit(module.main())
