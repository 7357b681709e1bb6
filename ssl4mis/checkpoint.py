"""Checkpoints that survive a crash: written to a temporary file and renamed, two generations, verified on load.

A file is a magic word, the SHA-256 of the rest, and what `torch.save` wrote. Only tensors and plain values are read.
A checkpoint names its run, so that one of another run in its place is not taken for its own.
"""
import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path

import torch

from ssl4mis.errors import UserError, not_written

MAGIC = b"SSL4MIS1"
LATEST, PREVIOUS = "latest.ckpt", "previous.ckpt"
KEPT = "weights"  # folder of the weights that stay
PARTS = ("method", "done")  # what every checkpoint has, and weights alone have not


def save(folder: Path, state: dict) -> None:
    """Write `state` as the latest checkpoint; the former latest becomes the previous one, unless it is of no use.

    UserError where it cannot be written; what was there stays.
    """
    latest = folder / LATEST
    partial = _write_partial(latest, state)
    try:
        if latest.exists() and _is_own(latest, state.get("run")):
            os.replace(latest, folder / PREVIOUS)
        os.replace(partial, latest)
    except OSError as error:
        raise not_written(latest, error) from None


def keep(folder: Path, done: int, run: str, weights: dict) -> None:
    """Write the weights of a run, by its id, after `done` iterations to stay; UserError as of `save`."""
    path = folder / KEPT / f"{done:06d}.ckpt"
    try:
        path.parent.mkdir(exist_ok=True)
        os.replace(_write_partial(path, {"run": run, "weights": weights}), path)
    except OSError as error:
        raise not_written(path, error) from None


def kept(folder: Path) -> dict[int, Path]:
    """Files that `keep` has written for a run, by the number of iterations, in order."""
    paths = [path for path in (folder / KEPT).glob("*.ckpt") if path.stem.isdecimal()]
    return {int(path.stem): path for path in sorted(paths)}


def read_kept(path: Path, run: str) -> dict:
    """Weights that `keep` has written for a run; UserError where they are damaged, or of another run."""
    found = read(path)
    if set(found) != {"run", "weights"}:
        raise UserError(f"{path}: holds {', '.join(map(str, found))[:100]}, expected the weights of a run")
    if found["run"] != run:
        raise UserError(f"{path}: weights of run {found['run']}, expected those of {run}")
    return found["weights"]


def fingerprint(weights: dict) -> str:
    """SHA-256 of a `state_dict`: names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write_partial(path: Path, state: dict) -> Path:
    """The state on disk, beside the file that it shall become."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(sealed(data))
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):  # what is there of it takes room where there is none left
            partial.unlink()
        if isinstance(error, OSError):
            raise not_written(path, error, "; the checkpoints before it stay, and the same command goes on") from None
        raise
    return partial


def sealed(data: bytes) -> bytes:
    """What `torch.save` wrote as the content of a checkpoint."""
    return MAGIC + hashlib.sha256(data).digest() + data


def read(path: Path) -> dict:
    """One checkpoint, or kept weights, on the CPU; UserError naming the file if it is not whole or holds no such thing.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a checkpoint") from None
    data = memoryview(raw)[len(MAGIC) + 32:]
    if raw[:len(MAGIC)] != MAGIC or hashlib.sha256(data).digest() != raw[len(MAGIC):len(MAGIC) + 32]:
        raise UserError(f"{path}: damaged checkpoint ({len(raw)} bytes), its checksum does not match")
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of torch.save raises anything
        raise UserError(f"{path}: holds more than tensors and plain values, or is none of this suite "
                        f"({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected a checkpoint")
    return found


def _read_own(path: Path, run: str | None) -> dict:
    """Like `read`, of a run, where its id is given; UserError for weights alone and what names another run."""
    state = read(path)
    lacking = [part for part in PARTS if part not in state]
    if lacking:
        raise UserError(f"{path}: lacks {', '.join(lacking)}, expected a checkpoint and not weights alone")
    found = state.get("run", run)  # older ones name none
    if run and found != run:
        raise UserError(f"{path}: a checkpoint of run {found}, expected one of {run}")
    return state


def _is_own(path: Path, run: str | None) -> bool:
    try:
        _read_own(path, run)
    except UserError:
        return False
    return True


def load(folder: Path, warn=print, run: str | None = None) -> dict | None:
    """The newest whole checkpoint of a run, by its id where it is given; None where there is none.

    One that is damaged or of another run is reported by `warn` and the generation before it is used; UserError if
    there are only such.
    """
    there = [folder / name for name in (LATEST, PREVIOUS) if (folder / name).exists()]
    for path in there:
        try:
            return _read_own(path, run)
        except UserError as error:
            if path == there[-1]:
                raise UserError(f"{error}; remove it to start again") from None
            warn(f"{error}; trying the generation before it")
    return None


def drop_previous(folder: Path) -> None:
    """Keep only the latest checkpoint, once a run is finished."""
    (folder / PREVIOUS).unlink(missing_ok=True)
