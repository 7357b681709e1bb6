"""Memory that is counted, planned and asked for: known sizes, and plans that are what real steps take."""

import copy
import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from commands import command

import networks
from data_prep import DataError
from networks.base import NetSpec, channels_last
from networks.checkpointing import recompute_stages
from ssl4mis import memory, memory_plan, registry
from ssl4mis.batch import Clock
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.loading import Loader
from ssl4mis.memory_plan import GAPS, KEPT, MIB, TEMPORARY, Heap, Scans, Tracker, no_content
from ssl4mis.method import Task
from ssl4mis.optimizers import optimizers

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WIDTH, PATCH = 4, (32, 32, 16)
WEIGHTS, TEACHER = "weights", "teachers and statistics"


def spec(name="supervised", **changes):
    cls = registry.method_class(name)
    return RunSpec(**{"method": name, "patch": list(PATCH), "width": WIDTH, "iterations": 100, "precision": "32-true",
                      "unlabeled_batch": 2 if cls.needs.unlabeled else 0} | changes)


def build(s, checkpointed=False):
    cls = registry.method_class(s.method)
    made = cls(networks.Build(s.network, 2, NetSpec(1, tuple(s.patch), s.width)),
               Task(2, len(s.patch), 1, (s.labeled_batch, s.unlabeled_batch)), cls.Config(**s.hp))
    if checkpointed:
        recompute_stages(made)
    return made


def plan(s, checkpointed=False, scans=None):
    return memory_plan.plan(lambda: build(s, checkpointed), s, CPU, scans)


def test_keeping_pages_is_for_glibc():
    assert memory.keep_pages() in (True, False)


# --- counting --------------------------------------------------------------------------------------------------------


def test_the_tracker_counts_storages_once_until_they_go():
    with Tracker() as tracker:
        a = torch.zeros(1000)
        view, b = a[:10], a + 1
        assert tracker.now == 8000 and tracker.numbers(view) == tracker.numbers(a) != tracker.numbers(b)
        del a
        assert tracker.now == 8000  # the view holds it
        del view
        assert tracker.now == 4000 and tracker.peak == 8000 and sum(tracker.at_peak.values()) == 8000
        tracker.restart()
        assert tracker.peak == 4000
        b.add_(1)
        assert tracker.peak == 4000
    outside = torch.zeros(5)
    assert tracker.numbers([outside, {"b": (b,)}]) == tracker.numbers(b) and tracker.now == 4000


def test_the_heap_fills_its_smallest_gap():
    heap = Heap()
    for number, size in enumerate((10, 5, 20, 5, 12, 5)):
        heap.take(number, size)
    assert heap.high == heap.top == 57
    heap.give(0)
    heap.give(2)
    heap.give(4)
    assert heap.gaps == [(0, 10), (15, 35), (40, 52)]
    heap.take(6, 11)  # into the gap of 12
    assert heap.gaps == [(0, 10), (15, 35), (51, 52)] and heap.high == 57
    heap.give(3)
    assert heap.gaps == [(0, 10), (15, 40), (51, 52)]
    heap.give(1)
    assert heap.gaps == [(0, 40), (51, 52)]
    heap.give(5)
    assert heap.gaps == [(0, 40)] and heap.top == 51
    heap.give(6)
    assert heap.gaps == [] and heap.top == 0
    heap.take(7, 0)
    heap.give(7)
    assert heap.gaps == [] and heap.high == 57


def test_tensors_without_content_take_no_memory():
    with no_content() as tracker:
        huge = torch.zeros(2**50)
        assert (huge + 1).shape == (2**50,) and tracker.peak >= 2**52
    assert torch.zeros(2).tolist() == [0, 0]


def test_what_needs_values_is_one_line():
    with pytest.raises(UserError, match="values of tensors") as error, no_content():
        torch.zeros(3).sum().item()
    assert "\n" not in str(error.value)


def test_modules_without_content_are_copied_and_moved():
    with no_content():
        net = networks.Build("vnet", 2, NetSpec(1, PATCH, 2))()
        twin = copy.deepcopy(net).to(memory_format=channels_last(3)).requires_grad_(False)
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert all(p.requires_grad for p in net.parameters()) and not any(p.requires_grad for p in twin.parameters())
    mine, theirs = (dict(n.named_parameters())["backbone.stages.2.0.weight"] for n in (net, twin))
    assert mine.is_contiguous() and theirs.is_contiguous(memory_format=torch.channels_last_3d)


# --- known sizes -----------------------------------------------------------------------------------------------------


def test_weights_are_four_bytes_each():
    s = spec("ua_mt")
    method, found = build(s), plan(s)
    count = sum(p.numel() for p in method.student.parameters())
    assert found.training[WEIGHTS] == found.evaluation[WEIGHTS] == 4 * count
    assert found.training["momentum"] == found.evaluation["gradients"] == 4 * count
    buffers = sum(b.nbytes for b in method.buffers())
    assert found.training[TEACHER] == 4 * count + buffers
    voxels = 32 * 32 * 16
    assert found.training["batch"] == 4 * voxels * 4 + 2 * voxels
    assert "momentum" in found.evaluation and KEPT not in found.evaluation
    assert sum(found.training.values()) / MIB == found.sums[0]


def test_scans_are_counted_where_they_are_known():
    s = spec()
    alone, found = plan(s), plan(s, scans=Scans(123456, (1, 64, 64, 64)))
    assert "training scans" not in alone.training
    assert found.training["training scans"] == found.evaluation["training scans"] == 123456
    assert alone.evaluation["test case"] == 4 * 32 * 32 * 16 and found.evaluation["test case"] == 4 * 64**3
    # two maps of probabilities more than of a window, at least
    assert found.evaluation[TEMPORARY] >= alone.evaluation[TEMPORARY] + 2 * 4 * (64**3 - 32 * 32 * 16)


def test_sizes_of_stored_cases(tmp_path):
    class Store:
        def path(self, case):
            return tmp_path / f"{case}.h5"

    class InMemory:
        def image(self, case):
            return np.zeros((2, len(case), 3, 4), np.float32)

    for n, case in enumerate(("a", "b", "c", "d"), 5):
        with h5py.File(tmp_path / f"{case}.h5", "w") as file:
            file["image"] = np.zeros((n, 4, 6) if case == "a" else (2, n, 4, 6), np.float32)
    parts = ("a", "b"), ("c",), ("b", "d")
    assert memory_plan.sizes(Store(), parts, 1, 2, torch.float16) == Scans(
        (5 + 6 + 7) * 24 * 2 * 2 + (5 + 6) * 24, (2, 8, 4, 6))
    assert memory_plan.sizes(Store(), parts, 2, 1, torch.float32) == Scans((2 + 3 + 3) * 6 * 4 + 5 * 6, (1, 4, 2, 3))
    assert memory_plan.sizes(InMemory(), (("a",), (), ("bb",)), 1, 2, torch.float32) == Scans(12 * 9, (2, 2, 3, 4))
    (tmp_path / "a.h5").write_text("no h5")
    with pytest.raises(DataError):
        memory_plan.sizes(Store(), parts, 1, 1, torch.float32)


# --- plans are what steps take ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names())
def test_a_batch_has_the_shapes_of_a_loader(name):
    class Store:
        def image(self, case):
            return np.zeros((1, 8, 8), np.float32)

        def label(self, case):
            return np.zeros((8, 8), np.uint8)

    def outline(what):
        if isinstance(what, torch.Tensor):
            return what.shape, what.dtype
        return [outline(part) for part in what] if isinstance(what, tuple) and not isinstance(what[:1], str) else None

    needs = registry.method_class(name).needs
    count = 2 if needs.unlabeled else 0
    real = Loader(Store(), "abc", "def", (4, 6), (2, count), 0, (), "cpu", needs=needs).batch(0, 0)
    made = memory_plan.new_batch(Task(2, 2, 1, (2, count)), needs, (4, 6))
    strip = [batch._replace(**{name: half and half._replace(cases=()) for name, half in batch._asdict().items()
                               if name != "image"}) for batch in (real, made)]
    assert outline(strip[0]) == outline(strip[1])


WAYS = (("32-true", False), ("bf16-mixed", True))  # of which every other method has one, and the rest is in `long`


@pytest.mark.parametrize(("name", "precision", "checkpointed"), [
    pytest.param(name, *way, marks=[] if (row + column) % 4 == 0 else pytest.mark.long)
    for row, name in enumerate(registry.names()) for column, way in enumerate(WAYS)])
def test_a_step_with_content_takes_what_is_planned(name, precision, checkpointed):
    """Storages of a real step, in the last stage, against those of a plan, by kind."""
    s = spec(name, precision=precision)
    found = []
    for real in (False, True):
        with Tracker() if real else no_content() as tracker:
            torch.manual_seed(0)
            method = build(s, checkpointed).to(memory_format=channels_last(3))
            stage = method.stages()[-1]
            method.enter(stage.name)
            method.train()
            each = optimizers(method, stage, s)
            for optimizer in each.values():
                memory_plan.momentum(optimizer)
            found.append(memory_plan.step(method, Clock(torch.tensor(99), 100, stage.name), each, s, tracker))
    planned, taken = found
    assert planned.keys() == taken.keys()
    for kind in (WEIGHTS, TEACHER, "momentum", "batch"):
        assert planned[kind] == taken[kind] > 0 or kind == TEACHER, kind
    assert planned[KEPT] == pytest.approx(taken[KEPT], rel=0.02)
    assert sum(planned.values()) == pytest.approx(sum(taken.values()), rel=0.06)


@pytest.mark.parametrize("name", ["ua_mt", "bcp"])
def test_the_trainers_step_takes_what_is_planned(name, tmp_path):
    """The peak of a whole run of a few steps, loader included."""
    from ssl4mis.trainer import Trainer

    class Store:
        def image(self, case):
            return np.random.default_rng(ord(case)).normal(size=(1, *PATCH)).astype(np.float32)

        def label(self, case):
            return (self.image(case)[0] > 0).astype(np.uint8)

    s = spec(name, iterations=8, augmentation=["rotflip"])
    planned = plan(s).training
    with Tracker() as tracker:
        method = build(s)
        loader = Loader(Store(), "abc", "def", PATCH, (2, 2), 0, s.augmentation, "cpu", needs=method.needs)
        Trainer(method, loader, s, tmp_path).fit()
    assert sum(planned.values()) - planned[GAPS] == pytest.approx(tracker.peak, rel=0.08)


@pytest.mark.parametrize("network", ["vnet", "unet"])
def test_checkpointing_and_half_precision_need_less(network):
    s = spec("mean_teacher", network=network)
    half = dataclasses.replace(s, precision="bf16-mixed")
    full, checkpointed, halved = plan(s), plan(s, checkpointed=True), plan(half)
    assert checkpointed.training[KEPT] < 0.6 * full.training[KEPT]
    assert halved.training[KEPT] < 0.7 * full.training[KEPT]
    assert checkpointed.sums[0] < full.sums[0] and halved.sums[0] < full.sums[0]
    assert checkpointed.training[WEIGHTS] == halved.training[WEIGHTS] == full.training[WEIGHTS]


@pytest.mark.parametrize("network", networks.NAMES)
def test_every_network_can_be_planned(network):
    found = plan(spec(network=network, patch=[64, 64, 32]))
    assert min(found.training[WEIGHTS], found.training[KEPT], found.evaluation[TEMPORARY]) > 0


def test_planes_are_planned():
    s = spec("mean_teacher", patch=[32, 32])
    assert plan(s, scans=Scans(1, (1, 40, 40, 10))).evaluation["test case"] == 4 * 40 * 40 * 10


def test_a_full_size_plan_needs_little_memory_itself():
    """A step of 5 GB, in a process that may not have one."""
    code = ("import resource; resource.setrlimit(resource.RLIMIT_DATA, (1200 * 2**20,) * 2)\n"
            "import runpy, sys; sys.argv[0] = 'benchmarks/run.py'; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = command("-c", code, "--method", "ua_mt", "--dataset", "LA", "--memory-plan", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    total = [line for line in done.stdout.splitlines() if line.startswith("| sum")]
    assert 3000 < float(total[0].split("|")[2]) < 6000


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_does_nothing(tmp_path):
    out = tmp_path / "results"
    done = command("benchmarks/run.py", "--method", "ua_mt", "--dataset", "phantom", "--memory-plan", "--out", out,
                   "--width", "4", "--checkpointing", "true", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "ua_mt on cpu in " in done.stdout and "with checkpointing" in done.stdout
    rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")}
    assert {WEIGHTS, TEACHER, "momentum", "gradients", "batch", KEPT, TEMPORARY, "training scans", "sum"} <= rows
    assert not out.exists()


@pytest.mark.parametrize(("words", "reason"), [
    (("--patch", "[30,32,16]"), "needs multiples of"),
    (("--checkpointing", "true", "--compile", "default"), "expected none with checkpointing"),
    (("--checkpointing", "half"), "expected True or False"),
])
def test_what_cannot_work_is_one_line(words, reason):
    done = command("benchmarks/run.py", "--method", "supervised", "--dataset", "phantom", "--memory_plan", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and reason in done.stderr, done.stderr
