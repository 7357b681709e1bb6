"""Backbones by name: `unet` is networks/unet.py, and every file offers `backbone(spec)` for a `base.NetSpec`."""
from dataclasses import dataclass
from importlib import import_module

NAMES = ("vnet", "unet", "nnunet", "resvnet", "attention_unet", "segresnet", "swin_unetr", "unetr", "voxresnet", "enet",
         "swin_unet")


def backbone(name, spec):
    """A new `Backbone` called `name`; ValueError naming the known ones, PatchError if it cannot take the patch."""
    if name not in NAMES:
        raise ValueError(f"network {name!r}: expected one of {', '.join(NAMES)}")
    from networks.base import check_patch

    made = import_module(f"networks.{name}").backbone(spec)
    check_patch(made, spec.patch)
    return made


@dataclass(frozen=True)
class Build:
    """Makes the networks of a run: `build()` is a `SegNet` on the chosen backbone with one head, `seg`.

    Attributes:
        network: name of the chosen backbone.
        classes: channels of the head `seg`.
        spec: the `NetSpec` of the run.
    """

    network: str
    classes: int
    spec: object

    def __call__(self, heads=None, network=None, dropout=None, upsampling=None):
        """A new network.

        Args:
            heads: name -> channels or (channels, decoder level); or a function of the backbone that gives this.
            network: another backbone than the chosen one.
            dropout, upsampling: as in `NetSpec`.
        """
        from dataclasses import replace

        from networks.base import SegNet

        made = backbone(network or self.network, replace(self.spec, dropout=dropout, upsampling=upsampling))
        return SegNet(made, heads(made) if callable(heads) else heads or {"seg": self.classes})
