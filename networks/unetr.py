"""UNETR (Hatamizadeh et al., WACV 2022, arXiv 2103.10504): a transformer over tokens feeds a U-Net decoder.

Smaller than published, as transformers trained from scratch on few cases are: at width 16, 8 layers of 384 with 6 heads
(published: 12 layers of 768 with 12 heads). Everything scales with the width. The convolutions are MONAI's blocks; the
transformer equals that of MONAI's `UNETR`, taps included: the skips leave after layers 3, 5 and 7.
"""
import torch
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional

from networks.base import Backbone, NetSpec
from networks.blocks import CONV, strides
from networks.borrowed import Decoder, exact

LEVELS, TOKEN = 5, 16
LAYERS, HIDDEN, HEADS = 8, 24, 6  # HIDDEN is in units of the width


class Layer(nn.Module):
    """Self-attention and a perceptron, each after layer norm and added to what came in; tokens are (B, N, C)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class UNETR(Backbone):
    """Tokens with learned positions, a transformer, deconvolutions from its layers to the skips.

    Sides must be multiples of 16. Positions belong to the patch of the spec; for another size they are interpolated.
    """

    checkpointed = ("layers", "skips")

    def __init__(self, spec: NetSpec):
        super().__init__()
        dims, hidden = spec.dims, HIDDEN * spec.width
        self.spatial_dims, self.drop_rates = dims, spec.dropout
        self.decoder_channels = tuple(spec.width * 2**level for level in range(LEVELS - 1))
        self.encoder_channels = (*self.decoder_channels, hidden)
        self.encoder_strides = strides(dims, LEVELS)
        self.multiple = self.encoder_strides[-1]
        self.embed = CONV[dims](spec.channels, hidden, TOKEN, stride=TOKEN)
        self.positions = nn.Parameter(torch.empty(1, hidden, *(side // TOKEN for side in spec.patch)))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(hidden)
        self.skips = nn.ModuleList([residual(dims, spec.channels, spec.width)])
        for level, outputs in enumerate(self.decoder_channels[1:], 1):
            self.skips.append(UnetrPrUpBlock(dims, hidden, outputs, LEVELS - 2 - level, 3, 1, 2, "instance",
                                             conv_block=True, res_block=True))
        exact(self.skips)
        self.decoder = self.new_decoder()

    def encode(self, x: Tensor) -> list[Tensor]:
        tokens = self.embed(x)
        grid = tokens.shape[2:]
        tokens = (tokens + self.positions_on(grid)).flatten(2).transpose(1, 2)
        states = []
        for layer in self.layers:
            tokens = layer(tokens)
            states.append(tokens)
        every = len(states) // 4
        *taps, bottom = (t.transpose(1, 2).unflatten(2, grid) for t in (*states[every::every], self.norm(tokens)))
        return [*(skip(tap) for skip, tap in zip(self.skips, (x, *taps), strict=True)), bottom]

    def positions_on(self, grid: torch.Size) -> Tensor:
        """The learned positions, (1, C, *grid)."""
        if self.positions.shape[2:] == grid:
            return self.positions
        return functional.interpolate(self.positions, grid, mode="trilinear" if self.spatial_dims == 3 else "bilinear")

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        return decoder(self.spatial_dims, self.encoder_channels, self.drop_rates)


def residual(dims: int, inputs: int, outputs: int) -> UnetrBasicBlock:
    """Two 3x3 convolutions with instance norm, added to the input."""
    return UnetrBasicBlock(dims, inputs, outputs, 3, 1, "instance", res_block=True)


def decoder(dims: int, channels: tuple[int, ...], dropout: tuple[float, ...] | None) -> Decoder:
    """Transposed convolutions, concatenated skips, residual blocks; `channels` are the encoder's."""
    stages = (UnetrUpBlock(dims, channels[level], channels[level - 1], 3, 2, "instance", res_block=True)
              for level in range(len(channels) - 1, 0, -1))
    return Decoder(dims, stages, dropout)


def backbone(spec: NetSpec) -> UNETR:
    """The factory that `networks.backbone` calls."""
    return UNETR(spec)
