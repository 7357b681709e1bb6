"""The V-Net against stored outputs, running statistics and parameter counts."""

import numpy as np
import pytest
import torch
from torch import nn

from networks import backbone
from networks.base import NetSpec, SegNet, channels_last, parameter_count

COUNTS = {  # heads of the networks whose parameter counts the suite shares
    "UA-MT VNet(1,2,16,batchnorm)": {"seg": 2},
    "MCF VNet(1,2,16)": {"seg": 2},
    "DTC VNet sdf(1,n_classes=1,16)": {"seg": 1, "sdf": 1},
}
NOT_COVERED = {
    "SSL4MIS unet_3D*": "network not in the suite yet",
    "MCF ResNet34-VNet*": "network not in the suite yet",
    "SSL4MIS nnUNet*": "network not in the suite yet",
    "MC-Net *": "network not in the suite yet",
    "CML VNet*": "network not in the suite yet",
    "BCP VNet*": "counts contrastive selectors that the authors never use",
    "* FC3DDiscriminator*": "network not in the suite yet",
}


@pytest.fixture(params=["contiguous", "channels_last"])
def stored(request, golden):
    """The file, the network with its weights and the images, in one memory layout."""
    data = golden("net_vnet")
    images = torch.tensor(data["images"])
    dims = images.ndim - 2
    spec = NetSpec(images.shape[1], tuple(images.shape[2:]), int(data["n_filters"]))
    net = SegNet(backbone("vnet", spec), {"seg": int(data["n_classes"])})
    names = zip(net.state_dict(), data["state_dict_names"], strict=True)  # theirs are in the same order
    net.load_state_dict({mine: torch.tensor(data[f"param/{theirs}"]) for mine, theirs in names})
    if request.param == "channels_last":
        net, images = (x.to(memory_format=channels_last(dims)) for x in (net, images))
    return data, net, images


def without_dropout(net):
    """The network in train mode, every dropout off."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
            module.eval()
    return net


def test_evaluation(stored):
    data, net, images = stored
    with torch.no_grad():
        logits = net.eval()(images).logits
    np.testing.assert_allclose(logits, data["logits_eval"], 1e-4, 1e-4)


def test_training(stored):
    data, net, images = stored
    with torch.no_grad():
        logits = without_dropout(net)(images).logits
    expected = data["logits_train"]
    np.testing.assert_allclose(logits, expected, 1e-4, 1e-4 * np.abs(expected).max())


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
    with torch.device("meta"):
        net = SegNet(backbone("vnet", NetSpec(1, (112, 112, 80))), COUNTS[name])
    assert parameter_count(net) == counts[name] == 9_448_866


def test_every_parameter_count_is_accounted_for(golden, every_array_is_in_one):
    every_array_is_in_one(golden("net_param_counts")["names"], COUNTS, NOT_COVERED)
