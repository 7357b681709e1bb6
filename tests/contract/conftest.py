"""A tiny world for contract tests: cases in memory, a narrow network, and any method in 2D or 3D."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch

import networks
from networks import swin_unet, swin_unetr
from networks.base import Head, NetSpec, channels_last
from networks.discriminator import ImageDiscriminator
from ssl4mis import registry
from ssl4mis.batch import Batch, Clock
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.loading import Loader
from ssl4mis.method import Task
from ssl4mis.trainer import Trainer

LABELED, UNLABELED, TEST = ("a", "b", "c"), ("d", "e", "f"), ("t",)
SIDE, PATCH, TOTAL = 20, 16, 1000
SMALL_WINDOWS = range(2, 4)  # sides
SURE = {"enet": 1000}  # what makes a head confident; ENet's batch norms hardly let through anything before training
PATCHES = {"swin_unetr": 32, "unet": 32}  # networks for which the common patch is too small


class Leak(AssertionError):
    """Training code asked for something that it must not see."""


class FakeStore:
    """Noisy class maps in memory. Labels of cases that are not labeled and images of test cases raise `Leak`."""

    def __init__(self, dims, classes, unlabeled_shift=0.0):
        self.shape, self.classes, self.shift = (SIDE,) * dims, classes, unlabeled_shift

    def _label(self, case):
        rng = np.random.default_rng(zlib.crc32(case.encode()))
        height = np.indices(self.shape).sum(0) / (len(self.shape) * SIDE) + 0.2 * rng.normal(size=self.shape)
        return np.clip(height * self.classes, 0, self.classes - 1).astype(np.uint8)

    def image(self, case):
        if case in TEST:
            raise Leak(f"image of test case {case} was read in training")
        rng = np.random.default_rng(zlib.crc32(case.encode()) + 1)
        image = self._label(case)[None] + rng.normal(size=(1, *self.shape))
        if case in UNLABELED:
            image = image + self.shift * rng.normal(size=image.shape)
        return image.astype(np.float32)

    def label(self, case):
        if case not in LABELED:
            raise Leak(f"label of case {case} was read in training")
        return self._label(case)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One method class in one number of dimensions and classes; everything it makes is new and seeded."""

    cls: type
    dims: int
    classes: int
    hp: dict = dataclasses.field(default_factory=dict)
    network: str = "vnet"
    unlabeled: bool = True
    side: int = PATCH

    @property
    def task(self):
        spec = self.spec()
        return Task(self.classes, self.dims, 1, (spec.labeled_batch, spec.unlabeled_batch))

    @property
    def patch(self):
        return (max(self.side, PATCHES.get(self.network, 0)),) * self.dims

    def method(self, seed=0, confident=False, width=2):
        """A new method in train mode; `confident` makes its networks sure of what they say, as training would."""
        torch.manual_seed(seed)
        build = networks.Build(self.network, self.classes, NetSpec(1, self.patch, width))
        method = self.cls(build, self.task, self.cls.Config(**self.hp))
        for head in [m for m in method.modules() if confident and isinstance(m, Head)]:
            head.conv.weight.data *= SURE.get(self.network, 50)
        for critic in [m for m in method.modules() if confident and isinstance(m, ImageDiscriminator)]:
            critic.head.bias.data += 5  # sure of the images that methods learn from
        return method.to(memory_format=channels_last(self.dims)).train()

    def spec(self, **changes):
        labeled = 2 * self.cls.needs.multiple
        unlabeled = labeled if self.cls.needs.unlabeled and self.unlabeled else 0
        return RunSpec(**{"method": "contract", "width": 2, "patch": list(self.patch), "iterations": 6,
                          "labeled_batch": labeled, "unlabeled_batch": unlabeled, "augmentation": ["rotflip"],
                          "precision": "32-true"} | changes)

    def loader(self, store=None):
        spec = self.spec()
        return Loader(store or FakeStore(self.dims, self.classes), LABELED, UNLABELED, spec.patch,
                      (spec.labeled_batch, spec.unlabeled_batch), spec.seed, spec.augmentation, "cpu",
                      needs=self.cls.needs)

    def trainer(self, folder, loader=None, seed=0, compile="none", **changes):
        folder.mkdir(parents=True, exist_ok=True)
        return Trainer(self.method(seed), loader or self.loader(), self.spec(**changes), folder, log_every=1,
                       save_every=3, compile=compile)

    def batch(self, label=None, unlabeled_label=None) -> Batch:
        """The first batch, with other labels for its halves where given."""
        batch = self.loader().batch(0, 0)
        labeled = batch.labeled if label is None else batch.labeled._replace(label=label)
        return batch._replace(labeled=labeled, unlabeled=batch.unlabeled._replace(label=unlabeled_label))

    def moments(self, method, step=TOTAL - 1):
        """A clock late in every stage and phase, when all ramps are up; the stage has been entered."""
        for stage in method.stages():
            method.enter(stage.name)
            method.train()
            for phase in stage.phases:
                yield Clock(torch.tensor(step), TOTAL, stage.name, phase.name)

    def losses(self, batch=None, method=None):
        """(clock, Losses) of every stage and phase of a freshly seeded method."""
        method, batch = method or self.method(), batch or self.batch()
        for clock in self.moments(method):
            torch.manual_seed(1)
            yield clock, method(batch, clock)


def pytest_generate_tests(metafunc):
    if "method_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--method") or registry.names()
        for name in names:
            try:
                registry.method_class(name)
            except UserError as error:
                raise pytest.UsageError(str(error)) from None
        metafunc.parametrize("method_name", names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Every method sees 2D and 3D, and 2 and 4 classes; the other half of the combinations is left to `long`.

    So is every other method of a test marked `half`. Methods that are named by `--method` see all of them.
    """
    for item in items if not config.getoption("--method") else ():
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        if "method_name" not in chosen:
            continue
        turn = zlib.crc32(chosen["method_name"].encode())
        if "world" in chosen:
            dims, classes = chosen["world"]
            turn += dims + classes // 2
        elif "dims" in chosen:
            turn += chosen["dims"]
        elif not item.get_closest_marker("half"):
            continue
        if turn % 2:
            item.add_marker("long")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Attention among 27 places and not 343: what a network owes does not depend on it, and it takes most of the time.

    tests/unit builds these networks as they are.
    """
    monkeypatch.setattr(swin_unetr, "WINDOW", 3)
    monkeypatch.setattr(swin_unet, "WINDOWS", SMALL_WINDOWS)


@pytest.fixture
def setting():
    """setting(method class, dims, classes) -> `Setting`."""
    return Setting


@pytest.fixture
def fake_store():
    """fake_store(dims, classes, unlabeled_shift) -> `FakeStore`."""
    return FakeStore
