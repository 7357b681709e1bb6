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


def save(folder: Path, state: dict) -> None:
    """Write `state` as the latest checkpoint; the former latest becomes the previous one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    partial = folder / (LATEST + ".partial")
    with open(partial, "wb") as file:
        file.write(MAGIC + hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    if (folder / LATEST).exists():
        os.replace(folder / LATEST, folder / PREVIOUS)
    os.replace(partial, folder / LATEST)


def read(path: Path) -> dict:
    """One checkpoint on the CPU; UserError naming the file if it is not whole."""
    raw = path.read_bytes()
    data = raw[len(MAGIC) + 32:]
    if raw[:len(MAGIC)] != MAGIC or hashlib.sha256(data).digest() != raw[len(MAGIC):len(MAGIC) + 32]:
        raise UserError(f"{path}: damaged checkpoint ({len(raw)} bytes), its checksum does not match")
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
