"""Swin UNETR (Hatamizadeh et al., BrainLes 2021, arXiv 2201.01266): a shifted-window transformer as encoder of a U-Net.

Made of the blocks of MONAI's `SwinUNETR`, without dropout. Its channels must be a multiple of 12; here they are the
multiple of 12 nearest to three times the width, so that width 16 is the published network of 48.
"""
from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging, compute_mask, get_window_size
from torch import Tensor, nn
from torch.nn import functional

from networks.base import Backbone, NetSpec
from networks.blocks import CONV, strides
from networks.borrowed import Decoder, exact
from networks.unetr import decoder, residual

LEVELS = 6
DEPTH, HEADS, WINDOW = 2, 3, 7  # blocks per stage, heads of the finest stage, side of a window


class BottomNorm(nn.Module):
    """Instance norm also where the map is a single voxel, as at the bottom of the smallest patch: it gives 0."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.shape[2:].numel() > 1 else x - x


class Attention(BasicLayer):
    """One stage on (B, *space, C): windows, shifted windows, half the resolution; needs no einops."""

    def forward(self, x: Tensor) -> Tensor:
        space = x.shape[1:-1]
        window, shift = get_window_size(space, self.window_size, self.shift_size)
        padded = [-(-side // size) * size for side, size in zip(space, window, strict=True)]
        mask = compute_mask(padded, window, shift, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.downsample(x)


class SwinUNETR(Backbone):
    """Four stages of windowed attention, residual blocks on the skips. Sides must be multiples of 32."""

    checkpointed = ("layers", "skips")

    def __init__(self, spec: NetSpec):
        super().__init__()
        dims, width = spec.dims, 12 * max(1, round(spec.width / 4))
        self.spatial_dims, self.drop_rates = dims, spec.dropout
        self.encoder_channels = (width, *(width * 2**level for level in range(LEVELS - 1)))
        self.decoder_channels = self.encoder_channels[:-1]
        self.encoder_strides = strides(dims, LEVELS)
        self.multiple = self.encoder_strides[-1]
        self.embed = CONV[dims](spec.channels, width, 2, stride=2)
        self.layers = nn.ModuleList(
            Attention(width * 2**stage, DEPTH, HEADS * 2**stage, (WINDOW,) * dims, [0.0] * DEPTH, qkv_bias=True,
                      downsample=PatchMerging, use_flash_attention=True)
            for stage in range(LEVELS - 2))
        inputs = (spec.channels, *self.encoder_channels[1:])
        self.skips = nn.ModuleList(residual(dims, *pair) for pair in zip(inputs, self.encoder_channels, strict=True))
        self.skips[-2] = nn.Identity()
        bottom = exact(self.skips)[-1].layer
        bottom.norm1, bottom.norm2 = BottomNorm(bottom.norm1), BottomNorm(bottom.norm2)
        self.decoder = self.new_decoder()

    def encode(self, x: Tensor) -> list[Tensor]:
        maps = [self.embed(x).movedim(1, -1)]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        maps = [functional.layer_norm(m, m.shape[-1:]).movedim(-1, 1) for m in maps]
        return [skip(m) for skip, m in zip(self.skips, (x, *maps), strict=True)]

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        return decoder(self.spatial_dims, self.encoder_channels, self.drop_rates)


def backbone(spec: NetSpec) -> SwinUNETR:
    """The factory that `networks.backbone` calls."""
    return SwinUNETR(spec)
