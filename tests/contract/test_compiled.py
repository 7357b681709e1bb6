"""Compiling the networks of a method changes speed only, and is done once per stage."""

import zlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import networks
from networks.base import Backbone, NetSpec, SegNet
from networks.blocks import BATCH_NORM, Layers
from networks.compiled import compile_networks
from ssl4mis import registry

OWN = ("vnet", "unet", "nnunet")


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.half
def test_networks_are_compiled_once_per_stage(method_name, setting):
    """Graphs are made in the first step of a stage only; their losses are those of the eager networks, whose norms are
    other kernels, up to rounding, dropout included. Each method has one of the suite's own networks.
    """
    cls, number = registry.method_class(method_name), zlib.crc32(method_name.encode())
    s = setting(cls, 2 + number % 2, 2, network=OWN[number % len(OWN)])
    method, eager, counter, loader = s.method(), s.method(), CompileCounter(), s.loader()
    assert compile_networks(method, backend=counter)
    assert method.state_dict().keys() == eager.state_dict().keys()
    made = []
    for mine, theirs in zip(s.moments(method), s.moments(eager), strict=True):
        for step in range(4):
            values = []
            for one, clock in ((method, mine), (eager, theirs)):
                torch.manual_seed(step)
                losses = one(loader.batch(0, step), clock._replace(step=clock.step - 4 + step))
                sum(losses.terms.values()).backward()
                one.after_step(clock)
                values.append({name: float(value.detach()) for name, value in losses.terms.items()})
            assert values[0] == pytest.approx(values[1], rel=0, abs=1e-4 * sum(values[1].values()))
            made.append(counter.frame_count)
        assert made[-4] == made[-1], f"graphs after each step of {mine.stage}: {made[-4:]}"
    assert made[0] > 0


class Tiny(Backbone):
    """One convolution with batch norm and dropout: what a compiler has to do for it takes seconds."""

    def __init__(self):
        super().__init__()
        self.describe_levels(NetSpec(1, (8, 8), 4), 2)
        layers = nn.Conv2d(1, 4, 3, padding=1), BATCH_NORM[2](4), nn.ReLU(), nn.Dropout2d()
        self.stages = nn.ModuleList([Layers(*layers)])

    def decode(self, skips):
        return skips


@pytest.mark.slow
def test_the_compiler_itself(setting, tmp_path, monkeypatch):
    """Three steps by inductor on the CPU: the losses are those of eager steps up to rounding, dropout included."""
    supervised, curves = registry.method_class("supervised"), []
    s = setting(supervised, 2, 2)
    monkeypatch.setattr(networks.Build, "__call__", lambda build: SegNet(Tiny(), {"seg": 2}))
    for compile in ("none", "default"):
        trainer = s.trainer(tmp_path / compile, compile=compile, iterations=3)
        curves.append([event["terms"] for event in trainer.fit()["curve"]])
        assert bool(trainer.method.net._compiled_call_impl) == (compile == "default")
    for eager, compiled in zip(*curves, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)
