"""V-Nets with several decoders, MC-Net's on one encoder and CML's pair, against stored outputs and statistics."""

import itertools

import numpy as np
import pytest
import torch
from reference.test_vnet_golden import without_dropout
from torch import nn

import networks
from networks.base import NetSpec, channels_last, parameter_count

FILES = ("net_mcnet", "net_cml")


def mc_net(spec, classes, decoders):
    """One encoder, so many decoders."""
    net = networks.Build("vnet", classes, spec)()
    for upsampling in net.backbone.upsamplings[1:decoders]:
        net.add_branch(upsampling)
    return net


def cml(spec, classes):
    """Two networks."""
    build = networks.Build("vnet", classes, spec)
    return nn.ModuleList([build(), build(upsampling="linear")])


def maps(net, image):
    """Name of the stored array -> map."""
    if isinstance(net, nn.ModuleList):
        outs = [part(image) for part in net]
        found = {f"features_{index}": out.features.encoder[-1] for index, out in enumerate(outs, 1)}
    else:
        first = net(image)
        outs, found = [first, *(branch(first.features.encoder) for branch in net.branches)], {}
    return found | {f"logits_{index}": out.logits for index, out in enumerate(outs, 1)}


@pytest.fixture(params=itertools.product(FILES, ["contiguous", "channels_last"]), ids="-".join)
def stored(request, golden):
    """The file, the network with its weights, the images in one memory layout, and the file's names of its state."""
    name, layout = request.param
    data = golden(name)
    images, classes = torch.tensor(data["images"]), int(data["n_classes"])
    spec = NetSpec(images.shape[1], tuple(images.shape[2:]), int(data["n_filters"]))
    names = data["state_dict_names"].tolist()
    if name == "net_mcnet":
        net = mc_net(spec, classes, sum(key.startswith("logits_") and key.endswith("_eval") for key in data))
    else:  # theirs are both encoders, then both decoders
        net = cml(spec, classes)
        names.sort(key=lambda name: name.partition(".")[0][-1])
    state = dict(zip(net.state_dict(), names, strict=True))
    net.load_state_dict({mine: torch.tensor(data[f"param/{theirs}"]) for mine, theirs in state.items()})
    if layout == "channels_last":
        net, images = (x.to(memory_format=channels_last(images.ndim - 2)) for x in (net, images))
    return data, net, images, state


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_maps(stored, mode):
    data, net, images, _ = stored
    with torch.no_grad():
        found = maps(net.eval() if mode == "eval" else without_dropout(net), images)
    assert {f"{name}_{mode}" for name in found} == {name for name in data if name.endswith(f"_{mode}")}
    for name, map in found.items():
        expected = data[f"{name}_{mode}"]
        atol = 1e-4 * (1 if mode == "eval" else np.abs(expected).max())
        np.testing.assert_allclose(map, expected, 1e-4, atol, err_msg=name)


def test_running_statistics_after_one_training_pass(stored):
    data, net, images, state = stored
    with torch.no_grad():
        maps(without_dropout(net), images)
    found, compared = net.state_dict(), [key for key in data if key.startswith("buffer_after_train/")]
    ours = {f"buffer_after_train/{theirs}": mine for mine, theirs in state.items()}
    assert compared
    for name in compared:
        atol = 1e-4 * np.abs(data[name]).max()
        np.testing.assert_allclose(found[ours[name]], data[name], 1e-4, atol, err_msg=name)


@pytest.mark.parametrize(("name", "make"), [
    ("MC-Net MCNet3d_v1(1,2,16)", lambda spec: mc_net(spec, 2, 2)),
    ("MC-Net MCNet3d_v2(1,2,16)", lambda spec: mc_net(spec, 2, 3)),
    ("CML VNet(1,2,16)", lambda spec: cml(spec, 2)),
])
def test_parameter_count(golden, name, make):
    data = golden("net_param_counts")
    counts = dict(zip(data["names"].tolist(), data["param_counts"].tolist(), strict=True))
    with torch.device("meta"):
        assert parameter_count(make(NetSpec(1, (16, 16, 16)))) == counts[name]
