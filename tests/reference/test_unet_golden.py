"""SSL4MIS's 3D U-Net and URPC's, which has four heads, against stored outputs."""

import itertools

import numpy as np
import pytest
import torch

from networks import backbone
from networks.base import NetSpec, SegNet, channels_last

FILES = {  # dropout as `NetSpec` has it
    "net_unet3d": None,
    "net_unet3d_dv_semi": (0.1, 0.2, 0.3, 0.5),
}
FULL_WIDTH = 64  # feature_scale divides it


@pytest.fixture(params=itertools.product(FILES, ["contiguous", "channels_last"]), ids="-".join)
def stored(request, golden):
    """The network with the file's weights, the images in one memory layout, and each head's stored map."""
    name, layout = request.param
    data = golden(name)
    images, classes = torch.tensor(data["images"]), int(data["n_classes"])
    width = int(FULL_WIDTH / int(data["feature_scale"]))
    spec = NetSpec(images.shape[1], tuple(images.shape[2:]), width, dropout=FILES[name])
    if "logits_eval" in data:
        maps = {"seg": data["logits_eval"]}
    else:  # stored fine to coarse, counted from 1; the authors' heads are from coarse to fine
        levels = reversed(range(sum(key.startswith("logits_") for key in data)))
        maps = {f"aux{level}" if level else "seg": data[f"logits_{level + 1}_eval"] for level in levels}
    assert len(maps) == sum(key.endswith("_eval") for key in data)
    heads = {head: (classes, int(head[3:]) if head != "seg" else 0) for head in maps}
    net = SegNet(backbone("unet", spec), heads)
    names = zip(net.state_dict(), data["state_dict_names"], strict=True)  # theirs are in the same order
    net.load_state_dict({mine: torch.tensor(data[f"param/{theirs}"]) for mine, theirs in names})
    if layout == "channels_last":
        net, images = (x.to(memory_format=channels_last(images.ndim - 2)) for x in (net, images))
    return net.eval(), images, maps


def test_evaluation(stored):
    net, images, maps = stored
    with torch.no_grad():
        heads = net(images).heads
    assert heads.keys() == maps.keys()
    for head, expected in maps.items():
        np.testing.assert_allclose(heads[head], expected, 1e-4, 1e-4, err_msg=head)


def test_training_differs_by_dropout_only(stored):
    """Instance norm keeps no running statistics: without dropout, train mode gives the stored maps too."""
    net, images, maps = stored
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.no_grad():
        heads = net(images).heads
    for head, expected in maps.items():
        np.testing.assert_allclose(heads[head], expected, 1e-4, 1e-4, err_msg=head)
