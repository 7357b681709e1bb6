"""How many samples go through a method's networks, counted while they do."""
from collections import Counter
from collections.abc import Callable

import torch

from networks.base import SegNet
from ssl4mis.batch import Clock
from ssl4mis.memory_plan import new_batch, no_content
from ssl4mis.method import Method


def segnets(method) -> dict[str, SegNet]:
    """The networks of a method by attribute, such as `teacher.net`."""
    return {name: module for name, module in method.named_modules() if isinstance(module, SegNet)}


def count_samples(method) -> Counter:
    """A counter of the samples that pass from now on, by (network, encoded or decoded, whether for a gradient).

    What the branches of a network decode counts as decoded by it.
    """
    counts = Counter()

    def counted(name, part, call):
        def through(x):
            found = call(x)
            last = found[-1] if part == "encoded" else found.features.decoder[0]
            counts[name, part, last.requires_grad] += len(last)
            return found
        return through

    for name, net in segnets(method).items():
        net.encode = counted(name, "encoded", net.encode)
        for decoding in (net, *net.branches):
            decoding.decode = counted(name, "decoded", decoding.decode)
    return counts


def per_step(build: Callable[[], Method], spec) -> tuple[float, float]:
    """Samples that go forward through a network per training step, and those of them that are for a gradient.

    Means over the steps of a run, each stage being near its end, where all terms are due. What is decoded is counted,
    so that a sample that two decoders of one network read counts twice. Nothing is computed.

    Args:
        build: makes the method of the run. spec: the `RunSpec`.

    UserError where something decides by the values of tensors.
    """
    forward = backward = 0.0
    with no_content():
        method = build()
        counts = count_samples(method)
        batch = new_batch(method.task, method.needs, spec.patch)
        for stage in method.stages():
            method.enter(stage.name)
            method.train()
            counts.clear()
            total = max(1, round(stage.share * spec.iterations))
            for phase in stage.phases:
                method(batch, Clock(torch.tensor(total - 1), total, stage.name, phase.name))
            decoded = {key: count for key, count in counts.items() if key[1] == "decoded"}
            forward += stage.share * sum(decoded.values())
            backward += stage.share * sum(count for key, count in decoded.items() if key[2])
    return forward, backward
