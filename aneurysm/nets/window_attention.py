"""Self-attention within windows of a map, with a learned bias by relative position.

Notation: m = b x number of windows, (p, q, r) window size, n = p q r tokens, c channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.no_effect import hold
from aneurysm.nets.shapes import expect_divisible, expect_map


class WindowAttention(nn.Module):
    """Multi-head self-attention over all voxels of a window, with a bias by relative position.

    One bias table serves windows of every size and shape: a row belongs to an offset (i, j, k) in voxels of
    the attended map, d slowest, and offsets of `reach` voxels or more share the outermost row, so weights
    trained on small crops run on large ones. With a reach of the window's side the table is that of the
    paper: (2 reach - 1)^3 rows, one column per head.
    """

    def __init__(self, width: int, heads: int, reach: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention of width {width} cannot be split over {heads} heads: use a divisor.")
        self.width, self.heads, self.reach = width, heads, reach
        self.qkv = nn.Linear(width, 3 * width)
        hold(self.qkv.bias, width, 2 * width)  # of the keys
        self.project = nn.Linear(width, width)
        # Rows and columns: a table of four axes would not survive a change to channels_last_3d.
        self.position_bias = nn.Parameter(torch.zeros((2 * reach - 1) ** 3, heads))

    def bias(self, window: Sequence[int]) -> Float[Tensor, "heads n n"]:
        """Additive attention bias of all token pairs of a window of (d, h, w) voxels."""
        side, device = 2 * self.reach - 1, self.position_bias.device
        rows = torch.zeros((), dtype=torch.long, device=device)
        for axis, size in enumerate(window):
            index = torch.arange(size, device=device)
            offset = (index[:, None] - index[None, :]).clamp(1 - self.reach, self.reach - 1) + self.reach - 1
            shape = [1] * 6  # query d, h, w, key d, h, w
            shape[axis], shape[axis + 3] = size, size
            rows = rows * side + offset.view(shape)
        n = window[0] * window[1] * window[2]
        return self.position_bias.t()[:, rows.reshape(-1)].view(self.heads, n, n)

    def forward(self, x: Float[Tensor, "m d h w c"]) -> Float[Tensor, "m d h w c"]:
        expect_map("WindowAttention", x, self.width, channels_last=True)
        m, d, h, w, c = x.shape
        qkv = self.qkv(x).reshape(m, d * h * w, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (m, heads, n, c/heads)
        mask = self.bias((d, h, w)).to(query.dtype)[None].expand(m, -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.project(out.transpose(1, 2).reshape(m, d, h, w, c))


def split_windows(x: Float[Tensor, "b d h w c"], window: Sequence[int]) -> Float[Tensor, "m p q r c"]:
    """Cut a map into windows of (p, q, r) voxels that divide it."""
    expect_divisible("split_windows", x.shape[1:4], window)
    b, d, h, w, c = x.shape
    p, q, r = window
    x = x.reshape(b, d // p, p, h // q, q, w // r, r, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, p, q, r, c)


def merge_windows(x: Float[Tensor, "m p q r c"], size: Sequence[int]) -> Float[Tensor, "b d h w c"]:
    """Put the windows of `split_windows` back into a map of (d, h, w) voxels."""
    _, p, q, r, c = x.shape
    expect_divisible("merge_windows", size, (p, q, r))
    d, h, w = size
    x = x.reshape(-1, d // p, h // q, w // r, p, q, r, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, d, h, w, c)
