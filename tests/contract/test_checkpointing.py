"""Checkpointing saves memory and changes nothing else: losses, gradients and state are the same to the bit."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import networks
from networks import checkpointing
from networks.base import NetSpec, channels_last
from networks.checkpointing import recompute_stages
from ssl4mis import registry

KINDS = [*itertools.product(networks.NAMES, (2, 3))]


def net(name, dims, checkpointed, layout=channels_last):
    torch.manual_seed(0)
    made = networks.Build(name, 3, NetSpec(1, (64, 32, 32)[:dims], 2))().to(memory_format=layout(dims))
    if checkpointed:
        recompute_stages(made)
    return made


def steps(module, precision=torch.float32, count=2):
    """Losses, gradients and state of some steps on the same image."""
    x = torch.randn(2, 1, *(64, 32, 32)[:module.backbone.spatial_dims], generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9), []
    for _ in range(count):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = module(x).logits.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.grad for p in module.parameters()], module.state_dict()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(call):
    """Bytes that the backward pass of a call keeps."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    assert kept is not None
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "dims"), KINDS)
def test_networks_learn_the_same(name, dims, precision):
    plain, sparing = (steps(net(name, dims, on), precision) for on in (False, True))
    assert same(plain[0], sparing[0]), "losses"
    assert same(plain[1], sparing[1]), "gradients"
    assert same(plain[2], sparing[2]), "state"
    assert any(grad.abs().max() > 0 for grad in plain[1])


@pytest.mark.parametrize("name", ["vnet", "resvnet"])
def test_so_they_do_in_torchs_own_layout(name):
    plain, sparing = (steps(net(name, 3, on, lambda dims: torch.contiguous_format)) for on in (False, True))
    assert same(plain, sparing)


@pytest.mark.parametrize(("name", "dims"), KINDS)
def test_networks_keep_less(name, dims):
    """Activations apart from the weights, which are kept anyway."""
    kept = []
    for on in (False, True):
        module = net(name, dims, on)
        x = torch.randn(4, 1, *(64, 32, 32)[:dims])
        weights = sum(p.nbytes for p in module.parameters())
        kept.append(saved(lambda module=module, x=x: module(x).logits.sum()) - (0 if on else weights))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize(("dims", "precision"), [(2, "bf16-mixed"), (3, "32-true")])
def test_methods_learn_the_same(method_name, setting, tmp_path, dims, precision):
    s, found = setting(registry.method_class(method_name), dims, 2), []
    for on in (False, True):
        trainer = s.trainer(tmp_path / str(on), precision=precision)
        if on:
            recompute_stages(trainer.method)
        curve = trainer.fit()["curve"]
        found.append(([event["terms"] for event in curve], [event["watch"] for event in curve],
                      [p.grad for p in trainer.method.parameters()], trainer.method.state_dict()))
    assert len(found[0][0]) == 6 and same(*found)


def test_statistics_that_are_counted_twice_would_be_seen(monkeypatch):
    monkeypatch.setattr(checkpointing._Passes, "__call__", lambda self, *inputs: self.forward(*inputs))
    plain, sparing = (steps(net("vnet", 2, on)) for on in (False, True))
    assert same(plain[1], sparing[1]) and not same(plain[2], sparing[2])


def test_another_dropout_would_be_seen(monkeypatch):
    real = checkpointing.checkpoint

    def forgetful(*args, **settings):
        return real(*args, **settings, preserve_rng_state=False)

    monkeypatch.setattr(checkpointing, "checkpoint", forgetful)
    plain, sparing = (steps(net("vnet", 2, on), count=1) for on in (False, True))
    assert same(plain[0], sparing[0]) and not same(plain[1], sparing[1])


def test_a_copy_is_checkpointed_and_has_its_own_weights():
    first = net("vnet", 2, True)
    second = copy.deepcopy(first)
    for parameter in first.parameters():
        parameter.data.zero_()
    assert same(steps(second), steps(net("vnet", 2, False)))
    assert all(p.grad is None for p in first.parameters())
    x = torch.zeros(2, 1, 64, 32)
    assert saved(lambda: second(x).logits.sum()) < saved(lambda: net("vnet", 2, False)(x).logits.sum()) / 2


def test_without_gradients_nothing_is_checkpointed(monkeypatch):
    def never(*args, **settings):
        raise AssertionError("checkpointed")

    module, x = net("vnet", 2, True), torch.zeros(2, 1, 64, 32)
    monkeypatch.setattr(checkpointing, "checkpoint", never)
    with torch.no_grad():
        module(x)
    with torch.inference_mode():
        module.eval()(x)
    with pytest.raises(AssertionError, match="checkpointed"):
        module(x)


@pytest.mark.parametrize("name", networks.NAMES)
def test_decoders_beside_a_backbone_are_checkpointed(name):
    module = net(name, 2, False)
    maps = [m.detach().requires_grad_() for m in module.backbone.encode(torch.randn(2, 1, 64, 32))]
    holder = nn.ModuleList([module.backbone.new_decoder()])
    before = saved(lambda: holder[0](maps)[0].sum())
    keys = list(holder.state_dict())
    recompute_stages(holder)
    assert saved(lambda: holder[0](maps)[0].sum()) < before and list(holder.state_dict()) == keys
