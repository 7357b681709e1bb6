"""Networks for prediction only: batch norm folded into convolutions and, on the CPU, one oneDNN call for each of them.

torch's own choice is a slow kernel for some shapes (one input channel, few voxels), and a map with one channel makes it
leave channels_last. Calling oneDNN with the ReLU as torch's compiler does avoids both, without a compiler's delay.
"""
import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.base import channels_last
from networks.blocks import CONVOLUTIONS, Layers

BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
CHAINS = (nn.Sequential.forward, Layers.forward)  # subclasses with others may call their children in another order


def frozen(module: nn.Module, dims: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy in evaluation mode that predicts the same, up to rounding, and cannot be trained.

    Args:
        module: of which convolutions, batch norms and ReLUs are replaced where they follow each other.
        dims: number of spatial dimensions.
        device: where it will run.
        dtype: of convolutions on the CPU; with torch.bfloat16 the copy must run under autocast.
    """
    made = copy.deepcopy(module).eval().requires_grad_(False).to(device, memory_format=channels_last(dims))
    for parent in [m for m in made.modules() if type(m).forward in CHAINS]:
        _fold(parent)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        for parent in list(made.modules()):
            _call_onednn(parent, dtype)
    return made


def _fold(chain: nn.Sequential) -> None:
    for (name, conv), (after, norm) in pairwise(list(chain.named_children())):
        if isinstance(conv, CONVOLUTIONS) and isinstance(norm, BATCH_NORMS) and norm.track_running_stats:
            setattr(chain, name, fuse_conv_bn_eval(conv, norm, isinstance(conv, TRANSPOSED)))
            setattr(chain, after, nn.Identity())


def _call_onednn(parent: nn.Module, dtype: torch.dtype) -> None:
    children = list(parent.named_children())
    in_order = type(parent).forward in CHAINS
    for place, (name, conv) in enumerate(children):
        if not isinstance(conv, CONVOLUTIONS) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        after = [pair for pair in children[place + 1:] if not isinstance(pair[1], nn.Identity)] if in_order else []
        rectified = bool(after) and isinstance(after[0][1], nn.ReLU)
        setattr(parent, name, _Convolution(conv, rectified, dtype))
        if rectified:
            setattr(parent, after[0][0], nn.Identity())


class _Convolution(nn.Module):
    """A convolution and perhaps a ReLU, (B, C, *space) -> (B, K, *space) of its type, channels_last."""

    def __init__(self, conv: nn.Module, rectified: bool, dtype: torch.dtype):
        super().__init__()
        self.format, self.activation = channels_last(conv.weight.ndim - 2), "relu" if rectified else "none"
        self.register_buffer("weight", conv.weight.to(dtype, memory_format=self.format))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.to(dtype))
        self.transposed = isinstance(conv, TRANSPOSED)
        padding = (conv.padding, conv.output_padding) if self.transposed else (conv.padding,)
        self.settings = (*padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """x of any type and layout."""
        x = x.to(self.weight.dtype).contiguous(memory_format=self.format)
        onednn = torch.ops.mkldnn
        call = onednn._convolution_transpose_pointwise if self.transposed else onednn._convolution_pointwise
        return call(x, self.weight, self.bias, *self.settings, self.activation, [], "")
