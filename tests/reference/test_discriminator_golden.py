"""The critics of DAN and SASSNet against stored outputs and parameter counts."""

import numpy as np
import pytest
import torch

from networks.base import channels_last, parameter_count
from networks.discriminator import ImageDiscriminator

FILES = ["net_discriminator_dan", "net_discriminator_sassnet"]
COUNTS = {  # channels of the maps
    "SSL4MIS FC3DDiscriminator(2 classes, ndf 64)": 2,
    "SASSnet FC3DDiscriminator(1 class, ndf 64)": 1,
}
ALONG = (0.07, 0.05, -0.03), (0.11, -0.06, 0.09)  # radians per voxel of each axis, of the maps and of the image


def waves(shape, maps, phase):
    """The maps (1, C, *space) and the image (1, 1, *space) that the reference files describe, float32."""
    axes = np.indices(shape)

    def along(factors, first=1):
        return sum(factor * axis for factor, axis in zip((first * factors[0], *factors[1:]), axes, strict=False))

    map = np.stack([0.5 + 0.5 * np.sin(along(ALONG[0], channel + 1) + phase) for channel in range(maps)])
    return (torch.tensor(x[None], dtype=torch.float32) for x in (map, np.cos(along(ALONG[1]) + phase)[None]))


@pytest.fixture(params=FILES)
def stored(request, golden):
    """The file and the critic with its weights, which stand in both in the same order."""
    data = golden(request.param)
    width, images, *kernel = data["param/conv1.weight"].shape
    critic = ImageDiscriminator(len(kernel), int(data["num_classes"]), images, width, data["input_shape"].tolist())
    names = zip(critic.state_dict(), data["state_dict_names"], strict=True)
    critic.load_state_dict({mine: torch.tensor(data[f"param/{theirs}"]) for mine, theirs in names})
    return data, critic.eval()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_evaluation(stored, layout):
    data, critic = stored
    inputs = waves(data["input_shape"], int(data["num_classes"]), float(data["phase"]))
    if layout == "channels_last":
        kind = channels_last(len(data["input_shape"]))
        critic, inputs = critic.to(memory_format=kind), [x.contiguous(memory_format=kind) for x in inputs]
    with torch.no_grad():
        logits = critic(*inputs).logits
    np.testing.assert_allclose(logits, data["discriminator_logits_eval"], 1e-4, 1e-4)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(golden, name):
    data = golden("net_param_counts")
    counts = dict(zip(data["names"].tolist(), data["param_counts"].tolist(), strict=True))
    with torch.device("meta"):
        critic = ImageDiscriminator(3, COUNTS[name])
    assert parameter_count(critic) == counts[name]


def test_every_array_is_compared(stored, every_array_is_in_one):
    inputs = ("input_shape", "phase", "num_classes", "state_dict_names", "param/*")
    every_array_is_in_one(stored[0], inputs, ("discriminator_logits_eval",))
