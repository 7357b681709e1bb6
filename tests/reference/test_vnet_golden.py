"""The V-Net, with one head and with DTC's two, and MCF's ResVNet against stored outputs and running statistics.

And the parameter counts of all networks.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from networks import backbone
from networks.base import NetSpec, SegNet, channels_last, parameter_count

FILES = {  # network, and its heads in the order of the authors' state_dict
    "net_vnet": ("vnet", ("seg",)),
    "net_vnet_sdf": ("vnet", ("sdf", "seg")),
    "net_mcf_resnet34": ("resvnet", ("seg",)),
}
MAPS = {  # from our heads to the stored arrays
    "logits": lambda out: out.logits,
    "tanh": lambda out: out.heads["sdf"].tanh(),
}


def pyramid(classes, levels):
    """One head on each of so many decoder levels."""
    return {"seg": classes, **{f"aux{level}": (classes, level) for level in range(1, levels)}}


COUNTS = {  # network and heads
    "UA-MT VNet(1,2,16,batchnorm)": ("vnet", {"seg": 2}),
    "MCF VNet(1,2,16)": ("vnet", {"seg": 2}),
    "DTC VNet sdf(1,n_classes=1,16)": ("vnet", {"seg": 1, "sdf": 1}),
    "SSL4MIS unet_3D(feature_scale=4,2 classes)": ("unet", {"seg": 2}),
    "SSL4MIS unet_3D_dv_semi(feature_scale=4,2 classes)": ("unet", pyramid(2, 4)),
    "SSL4MIS unet_3D_dv_semi(feature_scale=4,3 classes)": ("unet", pyramid(3, 4)),
    "MCF ResNet34-VNet(1,2,16)": ("resvnet", {"seg": 2}),
    "SSL4MIS nnUNet(base 16, 2 classes)": ("nnunet", pyramid(2, 6)),
}
NOT_COVERED = {
    "MC-Net *": "in test_mcnet_networks_golden.py",
    "CML VNet*": "in test_mcnet_networks_golden.py",
    "BCP VNet*": "counts contrastive selectors that the authors never use",
    "* FC3DDiscriminator*": "in test_discriminator_golden.py",
}
SPEC = NetSpec(1, (16, 256, 256), spacing=(4.0, 1.0, 1.0))  # nnU-Net's rules make of it the plan that SSL4MIS fixed


@pytest.fixture(params=itertools.product(FILES, ["contiguous", "channels_last"]), ids="-".join)
def stored(request, golden):
    """The file, the network with its weights and the images, in one memory layout."""
    name, layout = request.param
    data, (network, heads) = golden(name), FILES[name]
    images, classes = torch.tensor(data["images"]), int(data["n_classes"])
    spec = NetSpec(images.shape[1], tuple(images.shape[2:]), int(data["n_filters"]))
    net = SegNet(backbone(network, spec), dict.fromkeys(heads, classes))
    names = zip(net.state_dict(), data["state_dict_names"], strict=True)  # theirs are in the same order
    net.load_state_dict({mine: torch.tensor(data[f"param/{theirs}"]) for mine, theirs in names})
    if layout == "channels_last":
        net, images = (x.to(memory_format=channels_last(images.ndim - 2)) for x in (net, images))
    return data, net, images


def without_dropout(net):
    """The network in train mode, every dropout off."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
            module.eval()
    return net


def stored_maps(data, mode):
    """(map's name, stored array) of one mode."""
    found = [(name.removesuffix(f"_{mode}"), data[name]) for name in data if name.endswith(f"_{mode}")]
    assert found and {name for name, _ in found} <= set(MAPS)
    return found


def test_evaluation(stored):
    data, net, images = stored
    with torch.no_grad():
        out = net.eval()(images)
    for name, expected in stored_maps(data, "eval"):
        np.testing.assert_allclose(MAPS[name](out), expected, 1e-4, 1e-4, err_msg=name)


def test_training(stored):
    data, net, images = stored
    with torch.no_grad():
        out = without_dropout(net)(images)
    for name, expected in stored_maps(data, "train"):
        np.testing.assert_allclose(MAPS[name](out), expected, 1e-4, 1e-4 * np.abs(expected).max(), err_msg=name)


def test_running_statistics_after_one_training_pass(stored):
    data, net, images = stored
    with torch.no_grad():
        without_dropout(net)(images)
    compared = 0
    for mine, name in zip(net.state_dict().values(), data["state_dict_names"], strict=True):
        if f"buffer_after_train/{name}" in data:
            expected = data[f"buffer_after_train/{name}"]
            np.testing.assert_allclose(mine, expected, 1e-4, 1e-4 * np.abs(expected).max(), err_msg=str(name))
            compared += 1
    assert compared == sum(key.startswith("buffer_after_train/") for key in data) > 0


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(golden, name):
    data = golden("net_param_counts")
    counts = dict(zip(data["names"].tolist(), data["param_counts"].tolist(), strict=True))
    network, heads = COUNTS[name]
    with torch.device("meta"):
        net = SegNet(backbone(network, SPEC), heads)
    assert parameter_count(net) == counts[name]


def test_every_parameter_count_is_accounted_for(golden, every_array_is_in_one):
    every_array_is_in_one(golden("net_param_counts")["names"], COUNTS, NOT_COVERED)
