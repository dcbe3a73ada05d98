"""3x3 convolutions on a CPU with a third of the multiplications, for code that Inductor compiles.

Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308): every
4x4 tile of the result takes 36 products for each pair of channels instead of 144. The transforms before and after are
sums that Inductor fuses; uncompiled they would cost more than they save. Rounding grows about tenfold (some 1e-5 of
the result's size in float32), so this is not part of the exact tier.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdpm_ext.kernels.caches import Fingerprint
from tdpm_ext.kernels.family import ordinary

LEAST_CHANNELS = 32  # below, the transforms outweigh the products
LEAST_TILES = 64  # below, 36 small matrix products are slower than one large
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def fits(module: nn.Module) -> bool:
    """Whether a module is a plain 3x3 convolution of enough channels, on the CPU, in float32."""
    if type(module) is not nn.Conv2d or "forward" in vars(module) or module.padding_mode != "zeros":
        return False
    shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
    wide = min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and not hasattr(module, "parametrizations")
    return plain and wide and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def transform_weight(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] -> [36, in, out], computed in float64."""
    g = torch.tensor(_G, dtype=torch.float64, device=weight.device)
    u = torch.einsum("ya,oiab,xb->yxio", g, weight.detach().double(), g)
    return u.reshape(36, weight.shape[1], weight.shape[0]).to(weight.dtype).contiguous()


def conv3x3(x: Tensor, u: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of x [N, C, H, W] with padding 1, with a transformed weight [36, C, O]; in channels_last.

    Equal to ``F.conv2d(x, weight, bias, padding=1)`` but for rounding.
    """
    n, _, height, width = x.shape
    down, across = -(-height // 4), -(-width // 4)  # tiles
    x = _padded(x, 4 * down + 2, 4 * across + 2)
    rows = torch.stack(_before([x[:, i : i + 4 * down - 3 : 4] for i in range(6)]))
    tiles = torch.stack(_before([rows[:, :, :, j : j + 4 * across - 3 : 4] for j in range(6)]), 1)
    products = torch.bmm(tiles.view(36, n * down * across, -1), u).view(6, 6, n, down, across, -1)
    rows = torch.stack(_after(products.unbind(0)))
    y = _assembled(torch.stack(_after(rows.unbind(1))), height, width)
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)


# Operations of their own, since Inductor would otherwise compute what comes before once for every tile that reads it,
# and read the tiles element by element in what comes after.


@torch.library.custom_op("tdpm_ext::winograd_padded", mutates_args=())
def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """[N, C, H, W] -> [N, height, width, C] with one row and column of zeros before, the rest behind."""
    n, c, h, w = x.shape
    out = x.new_zeros(n, height, width, c)
    out[:, 1 : h + 1, 1 : w + 1] = x.permute(0, 2, 3, 1)
    return out


@_padded.register_fake
def _(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(len(x), height, width, x.shape[1])


@torch.library.custom_op("tdpm_ext::winograd_assembled", mutates_args=())
def _assembled(tiles: Tensor, height: int, width: int) -> Tensor:
    """[x in tile, y in tile, N, down, across, C] -> [N, height, width, C]."""
    n, down, across, c = tiles.shape[2:]
    out = tiles.new_empty(n, down, 4, across, 4, c)
    out.copy_(tiles.permute(2, 3, 1, 4, 0, 5))
    return out.view(n, 4 * down, 4 * across, c)[:, :height, :width].contiguous()


@_assembled.register_fake
def _(tiles: Tensor, height: int, width: int) -> Tensor:
    return tiles.new_empty(tiles.shape[2], height, width, tiles.shape[5])


def _before(d) -> tuple[Tensor, ...]:
    """B^T d: six values of the input -> six to multiply."""
    a, b, c, e = d[4] - 4 * d[2], d[3] - 4 * d[1], d[4] - d[2], 2 * (d[3] - d[1])
    return 4 * d[0] - 5 * d[2] + d[4], a + b, a - b, c + e, c - e, 4 * d[1] - 5 * d[3] + d[5]


def _after(m) -> tuple[Tensor, ...]:
    """A^T m: six products -> four values of the result."""
    s, d, t, u = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return m[0] + s + t, d + 2 * u, s + 4 * t, d + 8 * u + m[5]


def forward(self, input):
    """In place of ``Conv2d.forward``: Winograd's way while Inductor is tracing, torch's own otherwise."""
    tiles = len(input) * -(-input.shape[2] // 4) * -(-input.shape[3] // 4)
    if torch.compiler.is_compiling() and tiles >= LEAST_TILES:
        return conv3x3(input, self._tdpm_winograd, self.bias)
    return ordinary(self, input)


class TransformedWeights:
    """The transformed weights of some convolutions, kept up to date in place, so that compiled code sees edits.

    ``places``: where they stand, as (module, name).
    """

    def __init__(self, places: list[tuple[nn.Module, str]]):
        self._modules = [getattr(module, name) for module, name in places]
        self.weights = Fingerprint(places)
        self.update()

    def update(self) -> None:
        """Transform anew if any weight has changed."""
        if not self.weights.changed():
            return
        for module in self._modules:
            u = transform_weight(module.weight)
            known = vars(module).get("_tdpm_winograd")
            if known is None or known.shape != u.shape:
                vars(module)["_tdpm_winograd"] = u
            else:
                known.copy_(u)
