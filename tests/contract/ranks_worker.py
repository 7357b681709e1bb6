"""What each of several processes does in test_ranks.py: `torchrun ranks_worker.py FOLDER METHOD ...`."""

import sys
import zlib
from pathlib import Path

import torch
from contract.conftest import SMALL_WINDOWS, Setting
from torch import nn

from networks import ranks, swin_unet
from networks.checkpointing import recompute_stages
from ssl4mis import registry

NETWORKS = ("nnunet", "vnet")  # with statistics of a sample, and of the batch


class Uneven(Setting):
    """Three samples, which two processes do not share out evenly, and a teacher's pass of one."""

    def spec(self, **changes):
        return super().spec(labeled_batch=2, unlabeled_batch=1, **changes)


def setting(name, network):
    kind = Uneven if name.startswith("uneven/") else Setting
    # a batch norm needs several values
    return kind(registry.method_class(name.rpartition("/")[2]), 2, 3, network=network, side=32)


def networks_of(name):
    """Both for the simplest methods, one of them for each other method."""
    both = name.rpartition("/")[2] in ("supervised", "mean_teacher")
    return NETWORKS if both else NETWORKS[zlib.crc32(name.encode()) % 2:][:1]


def trained(case, folder, recompute=False):
    """The state after two steps in float64: in float32 a sum in another order flips a ReLU now and then.

    Dropout is off, which no two processes draw alike.
    """
    trainer = case.trainer(folder, iterations=2, precision="64-true")
    for module in trainer.method.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if recompute:
        recompute_stages(trainer.method)
    trainer.fit()
    return trainer.method.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    swin_unet.WINDOWS = SMALL_WINDOWS  # as in the process that compares
    ranks.join("cpu")
    out, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        for network in networks_of(name):
            place = f"{name.replace('/', '-')}-{network}"
            state = trained(setting(name, network), out / place, recompute=name.startswith("uneven/"))
            torch.save(state, out / f"{place}-{ranks.rank()}.pt")
