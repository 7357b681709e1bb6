"""Several processes that train as one: the samples of a network are spread over them, and what it says is gathered.

Every process has the whole batch and computes all losses of it, so that a loss over a batch (Dice, a threshold, a
mixture of two samples) is that of one process; only what costs time, the networks, is shared out. A gradient of a
process belongs to its own samples; their mean over processes, as DistributedDataParallel takes it, is the gradient of
the whole batch.
"""
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, distributed

_active: "_Spread | None" = None


def join(kind: str) -> None:
    """Join the processes that torchrun has started, if it has; `kind` of device is cpu or cuda."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def local_count() -> int:
    """How many processes train together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


class _Spread:
    """What networks must know of the step, and of the pass that they are in."""

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0
        self.real: int | None = None  # samples of this process in the pass that it is in

    @contextmanager
    def part(self, total: int, device: torch.device) -> Iterator[None]:
        self.calls += 1
        size = -(-total // count())
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((self.seed + self.calls * count() + rank()) % 2**63)
            with self.inside(min(max(total - rank() * size, 0), size)):
                yield

    @contextmanager
    def inside(self, real: int | None) -> Iterator[None]:
        before, self.real = self.real, real
        try:
            yield
        finally:
            self.real = before


@contextmanager
def spread(seed: int) -> Iterator[None]:
    """From here on networks share their samples out; with one process nothing changes.

    Args:
        seed: of this step, from which each process draws its networks' dropout.
    """
    global _active
    _active = _Spread(seed) if count() > 1 else None
    try:
        yield
    finally:
        _active = None


def active() -> bool:
    """Whether networks share their samples out now."""
    return _active is not None


def part(total: int, device: torch.device):
    """A context for what this process does of a pass of so many samples.

    Dropout is not the same for the samples of two processes, and what is drawn after the pass does not depend on it.
    """
    return _active.part(total, device)


def in_part() -> bool:
    """Whether this process is in a part of a pass, and not in what all do with all samples."""
    return _active is not None and _active.real is not None


def real(own: Tensor) -> Tensor:
    """The samples of this process (b, ...) in the pass that it is in, without those that fill up."""
    return own[:_active.real]


def noted() -> int | None:
    """What a part must know to be computed again, for `again`."""
    return _active and _active.real


def again(note: int | None):
    """A context like the part in which this was noted."""
    return _active.inside(note) if _active else nullcontext()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own):
        own = own.clone()
        distributed.all_reduce(own)
        return own

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        distributed.all_reduce(grad)
        return grad


def total(own: Tensor) -> Tensor:
    """The sum over processes; each of them has an effect on what the others make of it, which gradients tell."""
    return _Total.apply(own)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.total, ctx.size = len(x), -(-len(x) // count())
        own = x[rank() * ctx.size:(rank() + 1) * ctx.size]
        missing = ctx.size - len(own)
        return torch.cat([own, x[-1:].expand(missing, *x.shape[1:])]) if missing else own.clone()

    @staticmethod
    def backward(ctx, grad):
        return _all(grad)[:ctx.total] / count()  # what came through `gather` is as many times too large


def share(x: Tensor) -> Tensor:
    """The samples of this process (b, ...) of those of all (B, ...), as many for each; the last one fills up."""
    return _Share.apply(x)


def _all(own: Tensor) -> Tensor:
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(count())]
    distributed.all_gather(parts, own)
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, samples):
        ctx.size = len(own)
        return _all(own)[:samples]

    @staticmethod
    def backward(ctx, grad):
        own = grad[rank() * ctx.size:(rank() + 1) * ctx.size] * count()  # the mean over processes divides again
        missing = ctx.size - len(own)  # samples that filled up are nobody's
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own, None


def gather(own: Tensor, samples: int) -> Tensor:
    """The samples of all processes (samples, ...) from those of each (b, ...); gradients find their way back."""
    return _Gather.apply(own, samples)


class Shared(Sequence):
    """Feature maps of which each process holds its samples; one is gathered when it is looked at."""

    def __init__(self, own: Sequence[Tensor], samples: int):
        self.own, self.samples, self.gathered = list(own), samples, {}

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self.gathered:
            self.gathered[place] = gather(self.own[place], self.samples)
        return self.gathered[place]


def everywhere(value: bool, like: Tensor) -> bool:
    """Whether any process says so; all must ask. The answer comes over the device of a tensor."""
    flag = torch.tensor(float(value), device=like.device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def collect(own: list) -> list:
    """The lists of all processes, one entry of each in turn, as they were dealt out by [rank()::count()]."""
    if count() == 1:
        return own
    parts = [None] * count()
    distributed.all_gather_object(parts, own)
    return [parts[n % count()][n // count()] for n in range(sum(map(len, parts)))]
