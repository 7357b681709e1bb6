"""Time training steps against the peers' way, and against the passes of their networks alone.

The peers' way is written anew here, method by method: float32 in torch's own layout, in which the suite's networks run
as the published ones do, op for op; SGD and moving averages parameter by parameter; int64 labels; distance maps by
SciPy and components one sample after the other on the host; every loss brought to the host in every step. Ours is what
the trainer does in every step: bf16, channels_last, pages kept (`ssl4mis.memory`). CorrMatch has no peer in 3D.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip  (before numpy)
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data_prep import DataError
from networks.base import Branch, SegNet
from ssl4mis import config, memory, registry, run
from ssl4mis.correlation import CorrelationHead
from ssl4mis.leaderboard import markdown_table
from ssl4mis.loading import Loader, noise_seed
from ssl4mis.matching import last
from ssl4mis.method import Method, Task
from ssl4mis.schedules import learning_rate
from ssl4mis.trainer import Trainer

PEERS, SAME, OURS, NETWORKS = "peers (rewritten)", "peers, pages kept", "ours", "its networks alone"
HEADLINE = ("ua_mt", "mcf")
QUICK = ("corrmatch", "mcf", "ua_mt")
OVERHEAD = 1.1  # times its networks' passes that a step may take
EXACT, HALF = 1e-5, 0.05  # largest difference of a loss term, relative, in float32 and in bf16
PAGES = 100  # of memory, that a step may get anew
AFTER = 1e-3  # in float32 after an update, where rounding may lift single voxels over a threshold
TINY = ("--patch", "[32,32,16]", "--width", "2")
SIZE = ("--patch", "[64,64,48]")


def main(argv=None) -> int:
    """Exit status: 0 done, 1 a loss of ours differs from the peers', 2 an argument is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of LA (default: that of SSL4MIS_DATA, else phantoms)")
    parser.add_argument("--rounds", type=int, default=4, help="steps of ours; the peers make one (%(default)s)")
    parser.add_argument("--methods", metavar="NAMES", help=f"some of {','.join(registry.names())} "
                        "(those that have a peer here, and corrmatch)")
    parser.add_argument("--quick", action="store_true", help="tiny crops of phantoms, few methods: does it run?")
    options = parser.parse_args(argv)
    usual = QUICK if options.quick else sorted([*LOSSES, "corrmatch"])
    names = options.methods.split(",") if options.methods else usual
    for name in names:
        if name not in registry.names():
            parser.error(f"--methods {options.methods}: '{name}' is unknown, expected some of "
                         + ",".join(registry.names()))
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}, expected at least 1")
    try:
        setting = Setting(options.data, TINY if options.quick else SIZE, options.quick)
        title, _ = scans(setting.data, setting.tiny)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    memory.keep_pages()
    return compare(title, setting, names, 1 if options.quick else options.rounds)


def compare(title: str, setting: "Setting", names: list[str], rounds: int) -> int:
    """Time all methods, print the table and the closing line; returns the exit status."""
    published = [name for name in names if name in LOSSES]
    apart = {name: difference(name, dataclasses.replace(setting, words=TINY)) for name in published}
    fp32, bf16 = (matmul_peak(kind) for kind in (torch.float32, torch.bfloat16))
    seconds, work, apart_half = {}, {}, {}
    with contextlib.ExitStack() as stack:
        # a process for each, since what one method leaves in the heap makes the next one faster
        peers = {name: stack.enter_context(common.Apart(Published.of, name, setting)) for name in published}
        for name in names:
            trainer = setting.trainer(name)
            step, alone = common.steps(trainer), Networks(trainer)
            with alone.recorded(), FlopCounterMode(display=False) as counter:
                first = step()
            work[name] = counter.get_total_flops() / 1e9
            settle(alone, step)
            ways = {PEERS: peers.pop(name)} if name in published else {}
            if name == HEADLINE[0]:
                ways[SAME] = Published.of(name, setting)
            seconds[name], given = common.interleave(ways | {OURS: step, NETWORKS: alone}, rounds, once=(PEERS, SAME))
            if name in published:
                apart_half[name] = relative(given[PEERS], first)
                ways[PEERS].__exit__()

    exact = max(apart.values(), default=0) <= EXACT and max(apart_half.values(), default=0) <= HALF
    spent = {name: {way: statistics.median(s) for way, s in some.items()} for name, some in seconds.items()}
    faster, same = ({name: some[way] / some[OURS] for name, some in spent.items() if way in some}
                    for way in (PEERS, SAME))
    # what else the machine does, and pages that are new after all, add to both, more than they differ by
    overhead = {name: min(some[OURS]) / min(some[NETWORKS]) for name, some in seconds.items()}
    figure = "{:.3g}".format
    print(f"{title}; crops of {'x'.join(map(str, trainer.spec.patch))}, width {trainer.spec.width}, one step, "
          f"{trainer.spec.precision}. CPU seconds, median of {rounds} (peers: one).")
    print(common.machine(), end="\n\n")
    print(markdown_table(
        ["method", PEERS, SAME, OURS, "times faster", NETWORKS, "ours / networks", "GFLOP",
         "share of matmul peak: ours", "peers", "largest difference: float32", "bf16"],
        [[name, *(figure(some[way]) if way in some else "" for way in (PEERS, SAME, OURS)),
          figure(faster[name]) if name in faster else "", figure(some[NETWORKS]), f"{overhead[name]:.3f}",
          f"{work[name]:.0f}", f"{100 * work[name] / some[OURS] / bf16:.0f} %",
          f"{100 * work[name] / some[PEERS] / fp32:.0f} %" if PEERS in some else "",
          *(f"{off[name]:.0e}" if name in off else "" for off in (apart, apart_half))]
         for name, some in spent.items()]))
    print(f"The peers run with glibc's malloc as it is, each method in a process of its own, as their scripts do; "
          f"'{SAME}' in the process of ours and with its settings. A step of ours should take at most {OVERHEAD} times "
          "its networks' passes, the shortest of each. Differences are of loss terms, relative: of a step in float32 "
          "at a small size, and of the first one timed.")
    print(f"The matmul peaks are {fp32:.0f} (float32) and {bf16:.0f} GFLOP/s (bf16). At that peak, with nothing "
          "but its FLOPs, ours would be " + ", ".join(
              f"{spent[name][PEERS] * bf16 / work[name]:.3g} times as fast for {name}" for name in faster) + ".")
    common.close(
        "step", min((faster[name] for name in HEADLINE if name in faster), default=0.0), exact,
        {"ratio": 3, "least_ratio": 2}, {"largest_overhead": OVERHEAD},
        least_ratio=min(faster.values(), default=0.0), **faster,
        same_malloc_ratio=min(same.values(), default=0.0), largest_overhead=max(overhead.values()),
        **{f"overhead_{name}": value for name, value in overhead.items()}, data=title)
    return 0 if exact else 1


def settle(*calls: Callable, most: int = 5) -> None:
    """Make these calls until they get no more pages of memory, which in a run only the first steps do.

    Each call of a peer's script gets them, since it lets go of them before.
    """
    for _ in range(most):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for call in calls:
            call()
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < PAGES:
            return


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes:
        data: folder of LA, or None.
        words: of the command line of a run.
        tiny: whether the scans are small phantoms.
    """

    data: str | None
    words: tuple[str, ...]
    tiny: bool

    def trainer(self, name: str, precision: str = "auto") -> Trainer:
        """A new trainer of a method with fresh weights, which sees the same batch in every step."""
        precision = run.pick_precision(precision, torch.device("cpu"))
        spec = dataclasses.replace(spec_of(name, self.words), precision=precision)
        cases = {case.id: case for case in scans(self.data, self.tiny)[1]}
        torch.manual_seed(spec.seed)
        method = run.build_method(spec, Task(2, 3, 1, (spec.labeled_batch, spec.unlabeled_batch)), (0.625,) * 3)
        ids = list(cases)
        loader = Loader(Scans(cases), ids[:2], ids[2:], spec.patch, method.task.batch, spec.seed, spec.augmentation,
                        "cpu", needs=method.needs)
        with tempfile.TemporaryDirectory() as folder:  # nothing is written into it
            return Trainer(method, SameBatch(loader), spec, Path(folder))


@cache
def scans(data: str | None, tiny: bool) -> tuple[str, list[common.Case]]:
    """What they are, and two labeled and two unlabeled scans. Raises DataError."""
    return common.cases(data, 4, common.TINY if tiny else None)


@cache
def spec_of(name: str, words: tuple[str, ...]) -> config.RunSpec:
    [spec], _ = config.parse(["--method", name, "--dataset", "LA", *words], "step.py")
    return spec


class Scans(NamedTuple):
    """A store of scans in memory."""

    cases: dict[str, common.Case]

    def image(self, case: str) -> np.ndarray:
        return self.cases[case].image

    def label(self, case: str) -> np.ndarray:
        return self.cases[case].label


class SameBatch:
    """A loader that costs nothing: it always gives its first batch."""

    def __init__(self, loader: Loader):
        self.device, self.first = loader.device, loader.batch(0, 0)

    def batch(self, stage: int, step: int):
        return self.first


PARTS = {SegNet: ("encode", "decode"), Branch: ("decode",), CorrelationHead: ("forward",)}


class Networks:
    """The forward and backward passes that a step of a method makes, in its precision and layout, and nothing else.

    Calls of networks are recorded in a step, with the images that they saw and whether gradients were wanted, and made
    again; the loss is the mean of what they give.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.calls = trainer, []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """While this is entered calls are written down."""
        nets = [m for m in self.trainer.method.modules() if isinstance(m, SegNet | Branch | CorrelationHead)]
        for net in nets:
            for part in PARTS[type(net)]:
                setattr(net, part, self.recorder(net, part, getattr(net, part)))
        yield
        for net in nets:
            for part in {"encode", "decode", "forward"} & set(vars(net)):
                delattr(net, part)

    def recorder(self, net, part: str, call: Callable) -> Callable:
        def recording(given):
            seen = given.detach() if part == "encode" else len(given[0])
            self.calls.append((net, part, seen, torch.is_grad_enabled(), net.training))
            return call(given)

        return recording

    def __call__(self) -> None:
        method, losses, skips = self.trainer.method, [], None
        method.zero_grad()
        with self.trainer.fabric.autocast():
            for net, part, seen, wanted, training in self.calls:
                net.train(training)
                with contextlib.nullcontext() if wanted else torch.no_grad():
                    if part == "encode":
                        skips = net.encode(seen)
                        continue
                    some = skips if len(skips[0]) == seen else [last(x, seen) for x in skips]
                    maps = net.decode(some).heads.values() if part == "decode" else [net(some)]
                    losses += [x.mean() for x in maps if wanted]
        torch.stack(losses).sum().backward()
        method.train()


def matmul_peak(kind: torch.dtype, side: int = 2048, rounds: int = 5) -> float:
    """The best of several products of two square matrices, in GFLOP/s of CPU time."""
    a, b = torch.randn(2, side, side).to(kind)
    seconds, _ = common.interleave({"matmul": lambda: a @ b}, rounds + 1)
    return 2e-9 * side**3 / min(seconds["matmul"])


def relative(theirs: dict[str, float], ours: dict[str, Tensor]) -> float:
    """Largest relative difference of two steps' loss terms; infinite if they have other names."""
    if theirs.keys() != ours.keys():
        return math.inf
    return max(abs(float(ours[name].detach()) - value) / max(abs(value), 1e-6) for name, value in theirs.items())


def difference(name: str, setting: Setting) -> float:
    """`relative` of the first step in float32 and torch's own layout; infinite if the second differs by `AFTER`."""
    trainer = setting.trainer(name, "32-true")
    trainer.method.to(memory_format=torch.contiguous_format)
    ours, theirs = common.steps(trainer), Published.of(name, setting)
    first, second = (relative(theirs(), ours()) for _ in range(2))
    return first if second <= AFTER else math.inf


# The peers' way. The order of random draws is ours, so that losses can be compared.


class Published:
    """The loop of a published script, on the networks of a method; calling it makes a step and gives the loss terms."""

    def __init__(self, trainer: Trainer):
        self.method, self.spec, self.batch = trainer.method, trainer.spec, trainer.loader.first
        self.stage, (last, self.total) = len(trainer.plan) - 1, trainer.plan[-1]
        self.numbers, self.drop = itertools.count(self.total // 2), last.drop
        self.schedule = last.schedule or self.spec.schedule
        self.method.to(memory_format=torch.contiguous_format)
        self.method.enter(last.name)
        self.method.train()
        nets = [self.method.first, self.method.second] if hasattr(self.method, "second") else [self.method]
        self.optimizers = [torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=self.spec.learning_rate,
                                           momentum=0.9, weight_decay=0.0001, foreach=False) for net in nets]
        labeled = self.batch.labeled
        self.batch = self.batch._replace(labeled=labeled._replace(label=labeled.label.long()))

    @classmethod
    def of(cls, name: str, setting: Setting) -> "Published":
        """The loop of a method from its first weights."""
        return cls(setting.trainer(name, "32-true"))

    def __call__(self) -> dict[str, float]:
        method, step = self.method, next(self.numbers)
        torch.manual_seed(noise_seed(self.spec.seed, self.stage, step))
        rate = learning_rate(self.schedule, self.spec.learning_rate, step, self.total, self.drop)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        terms = LOSSES[self.spec.method](method, self.batch, step / self.total)
        loss = sum(terms.values())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if hasattr(method, "teacher"):
            alpha = min(1 - 1 / (step + 1), method.hp.decay) if method.teacher.warm_up else method.hp.decay
            for mean, parameter in zip(method.teacher.net.parameters(), method.student.parameters(), strict=True):
                mean.data.mul_(alpha).add_(parameter.data, alpha=1 - alpha)
        return {name: value.item() for name, value in terms.items()}


def ramp(done: float) -> float:
    return float(np.exp(-5.0 * (1.0 - done) ** 2))


def dice_loss(score: Tensor, target: Tensor) -> Tensor:
    target, smooth = target.float(), 1e-5
    intersect, y_sum, z_sum = torch.sum(score * target), torch.sum(target * target), torch.sum(score * score)
    return 1 - (2 * intersect + smooth) / (z_sum + y_sum + smooth)


def dice_of_all(probability: Tensor, label: Tensor) -> Tensor:
    one_hot = torch.cat([(label == k).unsqueeze(1) for k in range(probability.shape[1])], 1).float()
    loss, seen = 0.0, []
    for k in range(probability.shape[1]):
        term = dice_loss(probability[:, k], one_hot[:, k])
        seen.append(1.0 - term.item())
        loss += term
    return loss / probability.shape[1]


def supervised_loss(logits: Tensor, label: Tensor) -> Tensor:
    return 0.5 * (F.cross_entropy(logits, label) + dice_of_all(F.softmax(logits, dim=1), label))


def noise_like(method: Method, image: Tensor) -> Tensor:
    return torch.clamp(torch.randn_like(image) * method.hp.noise, -method.hp.noise_limit, method.hp.noise_limit)


def supervised(method, batch, done) -> dict[str, Tensor]:
    return {"supervised": supervised_loss(method.net(batch.image).logits, batch.labeled.label)}


def mean_teacher(method, batch, done) -> dict[str, Tensor]:
    """SSL4MIS: cross-entropy and Dice, softmax MSE to the teacher."""
    n, label, unlabeled = len(batch.labeled.image), batch.labeled.label, batch.unlabeled.image
    logits = method.student(batch.image).logits
    supervised = supervised_loss(logits[:n], label)
    with torch.no_grad():
        target = F.softmax(method.teacher.net(unlabeled + noise_like(method, unlabeled)).logits, dim=1)
    distance = torch.mean((F.softmax(logits, dim=1)[n:] - target) ** 2)
    return {"supervised": supervised, "consistency": method.hp.weight * ramp(done) * distance}


def ua_mt(method, batch, done) -> dict[str, Tensor]:
    """UA-MT: the same where the entropy of eight noisy passes is low."""
    n, label, unlabeled = len(batch.labeled.image), batch.labeled.label, batch.unlabeled.image
    passes, count = method.hp.passes, len(unlabeled)
    logits = method.student(batch.image).logits
    probability = F.softmax(logits, dim=1)
    supervised = 0.5 * (F.cross_entropy(logits[:n], label) + dice_loss(probability[:n, 1], label == 1))
    with torch.no_grad():
        target = method.teacher.net(unlabeled + noise_like(method, unlabeled)).logits
        preds = torch.zeros([count * passes, *logits.shape[1:]])
        both = unlabeled.repeat(2, 1, 1, 1, 1)
        for i in range(passes // 2):
            preds[2 * count * i:2 * count * (i + 1)] = method.teacher.net(both + noise_like(method, both)).logits
        preds = F.softmax(preds, dim=1).reshape(passes, count, *logits.shape[1:]).mean(dim=0)
        uncertainty = -1.0 * torch.sum(preds * torch.log(preds + 1e-6), dim=1, keepdim=True)
    distance = (F.softmax(logits[n:], dim=1) - F.softmax(target, dim=1)) ** 2
    threshold = (method.hp.threshold + (1 - method.hp.threshold) * ramp(done)) * np.log(2)
    mask = (uncertainty < threshold).float()
    consistency = torch.sum(mask * distance) / (2 * torch.sum(mask) + 1e-16)
    return {"supervised": supervised, "consistency": method.hp.weight * ramp(done) * consistency}


def dtc(method, batch, done) -> dict[str, Tensor]:
    """DTC: Dice, squared error of SciPy's distance maps, consistency of both tasks."""
    n, label = len(batch.labeled.image), batch.labeled.label
    heads = method.net(batch.image).heads
    tanh, probability = torch.tanh(heads["sdf"]), F.softmax(heads["seg"], dim=1)
    truth = torch.from_numpy(np.stack([signed_distance(one) for one in label.cpu().numpy()])).float()
    soft = torch.sigmoid(-method.hp.steepness * tanh)
    return {"supervised": dice_loss(probability[:n, 1], label == 1),
            "sdf": method.hp.sdf * F.mse_loss(tanh[:n, 0], truth),
            "consistency": method.hp.weight * ramp(done) * torch.mean((soft - probability[:, 1:]) ** 2)}


def signed_distance(label: np.ndarray) -> np.ndarray:
    inside = label.astype(bool)
    if not inside.any():
        return np.ones(label.shape)  # zeros in the released code: `compat` legacy
    positive, negative = ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside)
    scaled = [(map - map.min()) / (map.max() - map.min()) for map in (negative, positive)]
    boundary = inside & ~ndimage.binary_erosion(inside, border_value=1)
    return np.where(boundary, 0, scaled[0] - scaled[1])


def cps(method, batch, done) -> dict[str, Tensor]:
    """SSL4MIS: supervised losses of both networks, each one's labels for the other."""
    n, label = len(batch.labeled.image), batch.labeled.label
    one, other = method.first(batch.image).logits, method.second(batch.image).logits
    soft, soft_other = F.softmax(one, dim=1), F.softmax(other, dim=1)
    pseudo, pseudo_other = torch.argmax(soft[n:].detach(), dim=1), torch.argmax(soft_other[n:].detach(), dim=1)
    weight = method.hp.weight * ramp(done)
    return {"supervised/first": 0.5 * (F.cross_entropy(one[:n], label) + dice_of_all(soft[:n], label)),
            "supervised/second": 0.5 * (F.cross_entropy(other[:n], label) + dice_of_all(soft_other[:n], label)),
            "cross/first": weight * F.cross_entropy(one[n:], pseudo_other),
            "cross/second": weight * F.cross_entropy(other[n:], pseudo)}


def urpc(method, batch, done) -> dict[str, Tensor]:
    """URPC: supervised losses of all scales, their uncertainty-weighted distances to the mean."""
    n, label = len(batch.labeled.image), batch.labeled.label
    maps = list(method.net(batch.image).heads.values())
    soft = [F.softmax(logits, dim=1) for logits in maps]
    supervised = sum(0.5 * (F.cross_entropy(logits[:n], label) + dice_of_all(p[:n], label))
                     for logits, p in zip(maps, soft, strict=True)) / len(maps)
    mean, consistency = sum(soft) / len(soft), 0.0
    for p in soft:
        variance = torch.sum(F.kl_div(torch.log(p[n:]), mean[n:], reduction="none"), dim=1, keepdim=True)
        certain = torch.exp(-variance)
        distance = (mean[n:] - p[n:]) ** 2
        consistency += torch.mean(distance * certain) / (torch.mean(certain) + 1e-8) + torch.mean(variance)
    return {"supervised": supervised, "consistency": method.hp.weight * ramp(done) * consistency / len(soft)}


def mcf(method, batch, done) -> dict[str, Tensor]:
    """MCF: losses of both networks, rectification where they differ, the better one teaches."""
    n, label = len(batch.labeled.image), batch.labeled.label
    maps = [method.first(batch.image).logits, method.second(batch.image).logits]
    soft = [F.softmax(logits, dim=1) for logits in maps]
    differs = (torch.argmax(soft[0][:n], dim=1) != torch.argmax(soft[1][:n], dim=1)).to(torch.int32)
    one_hot = F.one_hot(label, 2).permute(0, 4, 1, 2, 3)
    terms, dices = {}, []
    for name, logits, p in zip(("first", "second"), maps, soft, strict=True):
        dices.append(dice_loss(p[:n, 1], label == 1))
        square = torch.mean((p[:n] - one_hot) ** 2, dim=1)
        rectified = torch.sum(differs * square) / (torch.sum(differs) + 1e-16)
        terms[f"supervised/{name}"] = (F.cross_entropy(logits[:n], label) + dices[-1]
                                       + method.hp.rectification * rectified)
    winner, loser = soft if dices[0].item() < dices[1].item() else soft[::-1]
    sharp = winner[n:].detach() ** (1 / method.hp.temperature)
    target = sharp / torch.sum(sharp, dim=1, keepdim=True)
    return terms | {"consistency": method.hp.weight * ramp(done) * torch.mean((loser[n:] - target) ** 2)}


def bcp(method, batch, done) -> dict[str, Tensor]:
    """BCP: mixed images, the teacher's largest components as labels."""
    (image_a, image_b), (label_a, label_b) = batch.labeled.image.chunk(2), batch.labeled.label.chunk(2)
    free_a, free_b = batch.unlabeled.image.chunk(2)
    shape = image_a.shape[2:]
    sides = [int(method.hp.box * side) for side in shape]
    x, y, z = (int(torch.randint(length - side, ())) for length, side in zip(shape, sides, strict=True))
    mask = torch.ones(shape)
    mask[x:x + sides[0], y:y + sides[1], z:z + sides[2]] = 0
    with torch.no_grad():
        pseudo_a, pseudo_b = (largest_components(method.teacher.net(free).logits) for free in (free_a, free_b))
    inward = method.student(image_a * mask + free_a * (1 - mask)).logits
    outward = method.student(free_b * mask + image_b * (1 - mask)).logits
    supervised = bcp_loss(inward, label_a, mask) + bcp_loss(outward, label_b, 1 - mask)
    guessed = bcp_loss(inward, pseudo_a, 1 - mask) + bcp_loss(outward, pseudo_b, mask)
    return {"supervised": supervised, "pseudo": method.hp.weight * guessed}


def largest_components(logits: Tensor) -> Tensor:
    found = []
    for mask in (F.softmax(logits, dim=1)[:, 1] >= 0.5).cpu().numpy():
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        found.append(parts == np.bincount(parts.flat)[1:].argmax() + 1 if count else mask)
    return torch.from_numpy(np.stack(found).astype(np.int64))


def bcp_loss(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    mask = mask.expand(label.shape)
    p, smooth = F.softmax(logits, dim=1), 1e-5
    one_hot = torch.zeros_like(p).scatter_(1, label.unsqueeze(1), 1)
    dice = 0.0
    for k in range(p.shape[1]):
        both, size = ((value * mask).flatten(1).sum(1) for value in (p[:, k] * one_hot[:, k], p[:, k] + one_hot[:, k]))
        dice += 1 - ((2 * both + smooth) / (size + smooth)).mean()
    entropy = (F.cross_entropy(logits, label, reduction="none") * mask).sum() / (mask.sum() + 1e-16)
    return 0.5 * (entropy + dice / p.shape[1])


LOSSES = {call.__name__: call for call in (supervised, mean_teacher, ua_mt, dtc, cps, urpc, mcf, bcp)}


if __name__ == "__main__":
    sys.exit(main())
