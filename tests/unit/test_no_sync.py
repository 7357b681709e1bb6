"""No part of a training step waits for the device, and none loops over parameters in Python."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
from networks.base import NetSpec
from ssl4mis import registry
from ssl4mis.batch import Clock
from ssl4mis.config import RunSpec
from ssl4mis.loading import Loader
from ssl4mis.method import Task
from ssl4mis.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
FILES = (*sorted((ROOT / "ssl4mis" / "methods").glob("*.py")),
         *(ROOT / "ssl4mis" / f"{name}.py"
           for name in "losses schedules method correlation augment copy_paste matching attacks".split()))
STEP = ("_train_step", "_note_bad")  # of the trainer
# calls that bring values, or sizes that depend on values, to the host
WAITING = {"item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
           "synchronize", "is_nonzero", "equal", "allclose"}
ONCE = {"trainable"}  # called once per stage
HOST = {"_first"}  # called with tensors of the host only
PATCH = 32


def within(tree: ast.AST, names: set[str]) -> set[int]:
    """Ids of all nodes in functions of these names."""
    return {id(part) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names
            for part in ast.walk(node)}


def waits(tree: ast.AST) -> list[str]:
    """Calls in a tree that would make the host wait, with their lines, outside of functions for the host."""
    host = within(tree, HOST)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and id(node) not in host)
    return [f"{call.lineno}: {call.func.attr}" for call in calls if call.func.attr in WAITING]


def loops(tree: ast.AST) -> list[int]:
    """Lines of loops over parameters or buffers, outside of functions that are called once."""
    once = within(tree, ONCE)
    each = (node for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension) and id(node) not in once)
    return [node.iter.lineno for node in each
            if any(isinstance(part, ast.Attribute) and part.attr in ("parameters", "buffers", "named_parameters")
                   for part in ast.walk(node.iter))]


def step_of_the_trainer() -> ast.Module:
    tree = ast.parse((ROOT / "ssl4mis" / "trainer.py").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in STEP]
    assert len(found) == len(STEP)
    return ast.Module(found, [])


TREES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in FILES} | {"a step": step_of_the_trainer()}


@pytest.mark.parametrize("name", TREES)
def test_nothing_in_a_step_waits_for_the_device(name):
    assert waits(TREES[name]) == []


@pytest.mark.parametrize("name", TREES)
def test_no_loop_over_parameters(name):
    assert loops(TREES[name]) == []


@pytest.mark.parametrize("text", ["loss.item()", "float(x.cpu())", "torch.nonzero(mask)", "if torch.equal(a, b): pass",
                                  "x[mask.nonzero()]", "[t.tolist() for t in terms]", "torch.cuda.synchronize()"])
def test_the_check_sees_what_waits(text):
    assert len(waits(ast.parse(text))) == 1
    assert len(waits(ast.parse(f"def _first_of(x):\n    {text}"))) == 1
    assert waits(ast.parse(f"def _first(x):\n    {text}")) == []


@pytest.mark.parametrize("text", ["for p in net.parameters():\n    p.mul_(2)", "[p for p in net.buffers()]",
                                  "for a, b in zip(net.parameters(), other.parameters()):\n    a.copy_(b)"])
def test_the_check_sees_loops(text):
    assert loops(ast.parse(text)) == [1]
    assert loops(ast.parse("torch._foreach_mul_(list(net.parameters()), 2)")) == []
    assert loops(ast.parse("def trainable(self):\n    return [p for p in self.parameters()]")) == []


class Store:
    """Noisy volumes in memory."""

    def image(self, case):
        return np.random.default_rng(ord(case)).standard_normal((1, *[PATCH + 4] * 3), dtype=np.float32)

    def label(self, case):
        return (self.image(case)[0] > 0.5).astype(np.uint8)


def trainer(name: str, folder: Path, device: str) -> Trainer:
    cls = registry.method_class(name)
    labeled = 2 * cls.needs.multiple
    batch = (labeled, labeled if cls.needs.unlabeled else 0)
    method = cls(networks.Build("vnet", 2, NetSpec(1, (PATCH,) * 3, 4)), Task(2, 3, 1, batch), cls.Config())
    spec = RunSpec(method=name, patch=[PATCH] * 3, width=4, iterations=20, labeled_batch=batch[0],
                   unlabeled_batch=batch[1], precision="bf16-mixed")
    loader = Loader(Store(), "abcd", "efgh", spec.patch, batch, 0, ("rotflip",), device, needs=cls.needs)
    return Trainer(method, loader, spec, folder)


def steps(name: str, folder: Path, device: str, mode: str) -> int:
    """Three steps of every stage, the first one, which may compile kernels and fill caches, without a check."""
    made, trained = 0, trainer(name, folder, device)
    for number, (stage, total) in enumerate(trained.plan):
        trained.stage, trained.bad = number, None
        trained.method.enter(stage.name)
        trained.method.train()
        trained._make_optimizers(stage)
        clock = Clock(torch.tensor(0, device=device), total, stage.name)
        for trained.step in range(3):
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode(mode if trained.step else "default")
            try:
                trained._train_step(clock, stage)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            clock, made = clock._replace(step=clock.step + 1), made + 1
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", registry.names())
def test_steps_without_waiting(tmp_path, name):
    assert steps(name, tmp_path, "cuda", "error") >= 3


def test_the_steps_of_that_test_are_steps(tmp_path):
    assert steps("bcp", tmp_path, "cpu", "error") == 6  # two stages
