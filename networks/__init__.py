"""Backbones by name: `unet` is networks/unet.py, and every file offers `backbone(channels, spatial_dims, width)`."""
from importlib import import_module

NAMES = ("vnet",)


def backbone(name, channels, spatial_dims, width):
    """A new `Backbone` called `name`; ValueError naming the known ones otherwise."""
    if name not in NAMES:
        raise ValueError(f"network {name!r}: expected one of {', '.join(NAMES)}")
    return import_module(f"networks.{name}").backbone(channels, spatial_dims, width)
