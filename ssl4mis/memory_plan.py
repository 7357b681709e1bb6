"""What memory a run will need, found without doing it.

Steps of the real method are taken on tensors that have a shape and no content, and those that are alive are counted.
"""
import weakref
from bisect import bisect, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.volumes import find_array, open_h5
from networks import batchnorm
from networks.base import channels_last
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.evaluator import predictor
from ssl4mis.inference import by_planes, sliding_window
from ssl4mis.leaderboard import markdown_table
from ssl4mis.method import Method, Needs, Task
from ssl4mis.optimizers import optimizers

LOWER = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
KEPT, TEMPORARY, GAPS = "activations for the backward pass", "temporary", "heap: gaps and kept pages"
MIB = 2**20


class Plan(NamedTuple):
    """Bytes at the peaks of a training step and of the prediction of a test case, by what they are there for."""

    training: dict[str, int]
    evaluation: dict[str, int]

    @property
    def sums(self) -> tuple[float, ...]:
        """MiB of training and of evaluation."""
        return tuple(sum(part.values()) / MIB for part in self)

    def __str__(self) -> str:
        names = dict.fromkeys([*self.training, *self.evaluation])
        rows = [[name, *(f"{part[name] / MIB:.0f}" if name in part else "" for part in self)] for name in names]
        rows.append(["sum", *(f"{mib:.0f}" for mib in self.sums)])
        table = markdown_table(["MiB", "training", "evaluation"], rows)
        return table + "Python, its libraries and what kernels need inside come on top."


class Scans(NamedTuple):
    """Bytes of the training cases, and (C, *space) of the largest test case."""

    training: int
    largest: tuple[int, ...]


def sizes(store, parts, downsample: int, channels: int, dtype: torch.dtype) -> Scans:
    """`Scans` of a store, whose images are only read where they are in no file; DataError.

    `parts` are the labeled, the unlabeled and the test cases.
    """
    labeled, unlabeled, test = ([_space(store, case, downsample) for case in part] for part in parts)
    voxels = sum(map(prod, labeled + unlabeled))
    return Scans(voxels * channels * dtype.itemsize + sum(map(prod, labeled)), (channels, *max(test, key=prod)))


def _space(store, case: str, downsample: int) -> tuple[int, ...]:
    if not hasattr(store, "path"):
        return store.image(case).shape[1:]
    path = store.path(case)
    with open_h5(path) as file:
        return tuple(side // downsample for side in find_array(file, path, "image", (3, 4)).shape[-3:])


def plan(build: Callable[[], Method], spec, device: torch.device, scans: Scans | None = None) -> Plan:
    """What a run holds at its peaks, each stage being near its end, where all terms are due.

    Not counted are what kernels need inside, Python and its libraries, the CUDA context and gaps in its memory.

    Args:
        build: makes the method of the run.
        spec: the `RunSpec`, with a precision that is not auto.
        device: where it will run.
        scans: None for no training cases and a single window of a test case. Where the test case has one axis more
            than the patch it is predicted plane by plane.
    """
    with no_content() as tracker, torch.device(device):
        method = build().to(memory_format=channels_last(len(spec.patch)))
        training: dict[str, int] = {}
        for stage in method.stages():
            method.enter(stage.name)
            method.train()
            each = optimizers(method, stage, spec)
            total = max(1, round(stage.share * spec.iterations))
            clock = Clock(torch.tensor(total - 1), total, stage.name)
            for optimizer in each.values():  # as in any step but the first one
                momentum(optimizer)
            training = max(training, step(method, clock, each, spec, tracker),
                           key=lambda part: sum(part.values()))
            high = tracker.heap.high
        evaluation = predict(method, each, spec, scans.largest if scans else None, tracker)
    parts = [training, evaluation]
    if device.type == "cpu":  # `memory.keep_pages`: the heap does not shrink
        for part, top in zip(parts, (high, tracker.heap.high), strict=True):
            part[GAPS] = max(0, top - sum(part.values()))
    if scans:
        parts = [part | {"training scans": scans.training} for part in parts]
    return Plan(*parts)


def momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer have its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def step(method: Method, clock: Clock, optimizers: dict, spec, tracker: "Tracker") -> dict[str, int]:
    """Bytes at the peak of a training step, taken as the trainer takes it."""
    tracker.restart()
    batch, kept = new_batch(method.task, method.needs, spec.patch), set()
    device, dtype = batch.image.device.type, LOWER.get(spec.precision)
    for phase, optimizer in optimizers.items():
        method.zero_grad()
        before = set(tracker.sizes)
        with torch.autocast(device, dtype) if dtype else nullcontext():
            losses = method(batch, clock._replace(phase=phase))
        kept |= set(tracker.sizes) - before
        sum(losses.terms.values()).backward()
        if spec.clip:
            nn.utils.clip_grad_norm_(method.trainable(phase), spec.clip)
        optimizer.step()
    method.after_step(clock)
    return split(tracker, method, optimizers,
                 {"batch": tracker.numbers(batch), KEPT: kept})


def predict(method: Method, optimizers: dict, spec, scan: tuple[int, ...] | None, tracker: "Tracker") -> dict[str, int]:
    """Bytes at the peak of the prediction of a scan after the last training step."""
    tracker.restart()
    image = torch.empty(scan or (method.task.channels, *spec.patch))
    with patch.object(torch.backends.mkldnn, "is_available", return_value=False):  # torch errs in its shapes
        predicted = predictor(method, image.device, spec.evaluation_precision)
    if image.ndim > len(spec.patch) + 1:
        by_planes(predicted, image, spec.patch)
    else:  # a smaller stride makes more windows, but not more at a time
        sliding_window(predicted, image, spec.patch, spec.patch).argmax(0).to(torch.uint8)
    return split(tracker, method, optimizers, {"test case": tracker.numbers(image)})


def split(tracker: "Tracker", method: Method, optimizers: dict, more: dict[str, Iterable[int]]) -> dict[str, int]:
    """Bytes at the peak by name; what has no other name is temporary."""
    parameters = list(method.parameters())
    names = {
        "weights": tracker.numbers([p for p in parameters if p.requires_grad]),
        "teachers and statistics": tracker.numbers([*(p for p in parameters if not p.requires_grad),
                                                    *method.buffers()]),
        "gradients": tracker.numbers([p.grad for p in parameters]),
        "momentum": tracker.numbers([list(optimizer.state.values()) for optimizer in optimizers.values()]),
    } | more
    left = dict(tracker.at_peak)
    found = {name: sum(left.pop(number, 0) for number in numbers) for name, numbers in names.items()}
    return found | {TEMPORARY: sum(left.values())}


def new_batch(task: Task, needs: Needs, patch: Iterable[int]) -> Batch:
    """A batch of the shapes and types that a `Loader` makes, without names, all 0."""
    (labeled, unlabeled), patch = task.batch, tuple(patch)
    image = torch.zeros(labeled + unlabeled, task.channels, *patch)

    def half(image: Tensor) -> Half:
        if not needs.strong:
            return Half(image, None, ())
        strong = torch.zeros(needs.strong, *image.shape)
        return Half(image, None, (), tuple(strong), torch.zeros(len(image), *patch, dtype=torch.bool))

    label = torch.zeros(labeled, *patch, dtype=torch.uint8)
    partner = half(torch.zeros_like(image[labeled:])) if needs.partner and unlabeled else None
    return Batch(image, Half(image[:labeled], label, ()), half(image[labeled:]), partner)


class Heap:
    """A heap as glibc keeps it: a block goes into the smallest gap that takes it, or on top.

    Attributes:
        high: the highest top so far, in bytes.
    """

    def __init__(self):
        self.top = self.high = 0
        self.gaps: list[tuple[int, int]] = []  # first byte and the one behind the last, in order
        self.blocks: dict[int, tuple[int, int]] = {}

    def take(self, number: int, size: int) -> None:
        """Place a block."""
        fitting = [(high - low, low) for low, high in self.gaps if high - low >= size]
        space, start = min(fitting, default=(size, self.top))
        if fitting:
            self.gaps.remove((start, start + space))
            if space > size:
                insort(self.gaps, (start + size, start + space))
        else:
            self.top = start + size
            self.high = max(self.high, self.top)
        self.blocks[number] = start, start + size

    def give(self, number: int) -> None:
        """Free a block; it joins the gaps beside it, or the top."""
        low, high = self.blocks.pop(number)
        if low == high:
            return
        place = bisect(self.gaps, (low, high))
        if place < len(self.gaps) and self.gaps[place][0] == high:
            high = self.gaps.pop(place)[1]
        if place and self.gaps[place - 1][1] == low:
            low = self.gaps.pop(place - 1)[0]
        if high == self.top:
            self.top = low
        else:
            insort(self.gaps, (low, high))


class Tracker(TorchDispatchMode):
    """Counts the storages that operators make while it is on, each by a number of its own.

    Attributes:
        sizes: bytes of those alive.
        peak: the largest sum since the last `restart`.
        at_peak: `sizes` at that moment.
        heap: where malloc would have put them.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.by_address: dict[int, int] = {}
        self.count = self.now = 0
        self.heap = Heap()
        self.restart()

    def restart(self) -> None:
        """Look for a new peak."""
        self.peak, self.at_peak = self.now, dict(self.sizes)

    def numbers(self, tensors) -> set[int]:
        """Numbers of the storages of all tensors in a nested structure."""
        found = {self.by_address.get(tensor.untyped_storage()._cdata)
                 for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)}
        return found - {None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        if self.now > self.peak:
            self.restart()
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.by_address:
            self.count += 1
            self.by_address[address], self.sizes[self.count] = self.count, storage.nbytes()
            self.now += storage.nbytes()
            self.heap.take(self.count, storage.nbytes())
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        number = self.by_address.pop(address)
        self.now -= self.sizes.pop(number)
        self.heap.give(number)


class _Copies(TorchFunctionMode):
    """Deep copies of tensors without content, which torch does not make."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            made = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return memo[id(tensor)]


class _Fused:
    """What the kernels of `networks.fused` give, by its shapes and types."""

    @staticmethod
    def normalize(x, weight, bias, eps, slope, units):
        mean, variance = torch.empty(2, units, x.shape[1], dtype=torch.float64)
        return torch.empty_like(x), mean, variance

    @staticmethod
    def gradients(grad, x, *others):
        by_weight, by_bias = torch.empty(2, x.shape[1], dtype=torch.float64)
        return torch.empty_like(x), by_weight, by_bias

    @staticmethod
    def column_sums(x):
        return torch.empty(x.shape[1], dtype=torch.float64)


@torch.no_grad()
def _convert(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which `to` goes through and which fails for tensors without content."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for place in (module._parameters, module._buffers):
        for name, tensor in place.items():
            if tensor is not None:
                made = fn(tensor)
                place[name] = nn.Parameter(made, tensor.requires_grad) if place is module._parameters else made
    return module


@contextmanager
def no_content() -> Iterator[Tracker]:
    """From here on tensors have a shape and no content, and the `Tracker` counts them."""
    fused = batchnorm._compiled() and _Fused
    with FakeTensorMode(allow_non_fake_inputs=True), _Copies(), Tracker() as tracker, \
            patch.object(nn.Module, "_apply", _convert), patch.object(batchnorm, "_compiled", lambda: fused), \
            patch.object(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor):  # it draws until all values fit
        try:
            yield tracker
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(f"no memory plan: something decides by the values of tensors ({error})") from None
