"""Checkpoints that survive a crash: written to a temporary file and renamed, two generations, verified on load.

A file is a magic word, the SHA-256 of the rest, and what `torch.save` wrote. Only tensors and plain values are read.
"""
import hashlib
import io
import os
from pathlib import Path

import torch

from ssl4mis.errors import UserError

MAGIC = b"SSL4MIS1"
LATEST, PREVIOUS = "latest.ckpt", "previous.ckpt"
KEPT = "weights"  # folder of the weights that stay


def save(folder: Path, state: dict) -> None:
    """Write `state` as the latest checkpoint; the former latest becomes the previous one, unless it is damaged."""
    partial = _write_partial(folder / LATEST, state)
    if (folder / LATEST).exists() and _payload(folder / LATEST) is not None:
        os.replace(folder / LATEST, folder / PREVIOUS)
    os.replace(partial, folder / LATEST)


def keep(folder: Path, done: int, weights: dict) -> None:
    """Write the weights after `done` iterations to stay, as `read` reads them."""
    path = folder / KEPT / f"{done:06d}.ckpt"
    path.parent.mkdir(exist_ok=True)
    os.replace(_write_partial(path, weights), path)


def kept(folder: Path) -> dict[int, Path]:
    """Files that `keep` has written for a run, by the number of iterations, in order."""
    return {int(path.stem): path for path in sorted((folder / KEPT).glob("*.ckpt"))}


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
    with open(partial, "wb") as file:
        file.write(MAGIC + hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    return partial


def _payload(path: Path) -> bytes | None:
    """What `torch.save` wrote into a checkpoint; None where the checksum does not match."""
    raw = path.read_bytes()
    data = raw[len(MAGIC) + 32:]
    whole = raw[:len(MAGIC)] == MAGIC and hashlib.sha256(data).digest() == raw[len(MAGIC):len(MAGIC) + 32]
    return data if whole else None


def read(path: Path) -> dict:
    """One checkpoint on the CPU; UserError naming the file if it is not whole."""
    data = _payload(path)
    if data is None:
        raise UserError(f"{path}: damaged checkpoint ({path.stat().st_size} bytes), its checksum does not match")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load(folder: Path, warn=print) -> dict | None:
    """The newest whole checkpoint of a run, None where there is none.

    A damaged one is reported by `warn` and the generation before it is used; UserError if only damaged ones are there.
    """
    damaged = None
    for name in (LATEST, PREVIOUS):
        if (folder / name).exists():
            try:
                return read(folder / name)
            except UserError as error:
                damaged = error
                warn(f"{error}; trying the generation before it")
    if damaged:
        raise damaged
    return None


def drop_previous(folder: Path) -> None:
    """Keep only the latest checkpoint, once a run is finished."""
    (folder / PREVIOUS).unlink(missing_ok=True)
