"""Straightforward restatements of the networks: what `nets.py` compares the product with.

Each writes its formula down in the order of the paper, one operation after the other, and takes the weights
of the product's network, so that the same numbers must come out. Cubic or not, but sizes that the wavelet
levels divide, as in the published code. `check` of `nets_cases.py` holds both against each other before
anything is timed.

Notation: b batch, c channels, (d, h, w) map size, m = b x number of windows, n tokens of a window.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from ptwt.conv_transform_3 import wavedec3
from torch import Tensor, nn

# product's name -> name here, inside a block
BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.qkv": "qkv",
    "attention.project": "project",
    "feed_forward.expand": "point",
    "feed_forward.norm1": "ffn_norm1",
    "feed_forward.depthwise": "depthwise",
    "feed_forward.norm2": "ffn_norm2",
    "feed_forward.contract": "back",
}


def window_pairs(window: Sequence[int], reach: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, (n, n); offsets beyond `reach` are cut."""
    cells = torch.cartesian_prod(*[torch.arange(size) for size in window]).reshape(-1, 3)
    offset = (cells[:, None] - cells[None, :]).clamp(1 - reach, reach - 1) + reach - 1  # (n, n, 3)
    side = 2 * reach - 1
    return (offset[..., 0] * side + offset[..., 1]) * side + offset[..., 2]


class PlainBlock(nn.Module):
    """One WaveFormer block: every level's full wavelet transform, explicit attention, FFN with reshapes."""

    def __init__(
        self, width: int, heads: int, level: int, mlp_ratio: float, multi_scale: bool, reach: int
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads, self.level, self.multi_scale, self.reach = heads, level, multi_scale, reach
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * reach - 1) ** 3, heads))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.point = nn.Linear(width, hidden)
        self.ffn_norm1 = nn.LayerNorm(hidden)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.ffn_norm2 = nn.LayerNorm(hidden)
        self.back = nn.Linear(hidden, width)
        self.pairs: dict[tuple[int, ...], Tensor] = {}  # window -> rows of the table, as a buffer would be

    def attention(self, z: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(e) + bias) v over all tokens; z: (m, p, q, r, c)."""
        m, p, q, r, c = z.shape
        n, e = p * q * r, c // self.heads
        if (p, q, r) not in self.pairs:
            self.pairs[p, q, r] = window_pairs((p, q, r), self.reach).to(z.device)
        qkv = self.qkv(z.reshape(m, n, c)).reshape(m, n, 3, self.heads, e)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = torch.einsum("mihe,mjhe->mhij", query, key) / e**0.5
        bias = self.table[self.pairs[p, q, r].reshape(-1)].reshape(n, n, self.heads).permute(2, 0, 1)
        weights = (logits + bias.unsqueeze(0)).softmax(dim=-1)
        mixed = torch.einsum("mhij,mjhe->mihe", weights, value)
        return self.project(mixed.reshape(m, n, c)).reshape(m, p, q, r, c)

    def windowed(self, z: Tensor, window: Sequence[int]) -> Tensor:
        """Attention in windows: partition, attend, and the partition undone."""
        b, d, h, w, c = z.shape
        p, q, r = window
        parts = z.reshape(b, d // p, p, h // q, q, w // r, r, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        answer = self.attention(parts.reshape(-1, p, q, r, c))
        answer = answer.reshape(b, d // p, h // q, w // r, p, q, r, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return answer.reshape(b, d, h, w, c)

    def mix(self, z: Tensor) -> Tensor:
        """The attention's answer on the low band(s), upsampled to the map and added."""
        if self.level == 0:
            return self.attention(z)
        size = z.shape[1:4]
        if any(s % 2**self.level for s in size):
            raise ValueError(f"A map of {tuple(size)} voxels has no {self.level} whole wavelet levels.")
        window = [s // 2**self.level for s in size]
        low, total = z.permute(0, 4, 1, 2, 3).contiguous(), None
        for scale in range(1, self.level + 1):
            low, _ = wavedec3(low, "haar", mode="zero", level=1)  # the details too: the decoder's input
            if self.multi_scale or scale == self.level:
                answer = self.windowed(low.permute(0, 2, 3, 4, 1), window).permute(0, 4, 1, 2, 3)
                answer = F.interpolate(answer, size=tuple(size), mode="trilinear", align_corners=False)
                total = answer if total is None else total + answer
        assert total is not None
        return total.permute(0, 2, 3, 4, 1)

    def feed_forward(self, u: Tensor) -> Tensor:
        """u + fc(GELU(LN(dw3(GELU(LN(pw u)))))), as tokens but for the convolution."""
        b, d, h, w, c = u.shape
        tokens = u.reshape(b, d * h * w, c)
        v = F.gelu(self.ffn_norm1(self.point(tokens)))
        volume = v.transpose(1, 2).reshape(b, -1, d, h, w)
        v = self.depthwise(volume).flatten(2).transpose(1, 2)
        v = self.back(F.gelu(self.ffn_norm2(v)))
        return (tokens + v).reshape(b, d, h, w, c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class PlainMerge(nn.Module):
    """Eight strided slices, joined, normalised and reduced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width, eps=1e-6)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class PlainEncoder(nn.Module):
    """The WaveFormer encoder written down plainly, for one channel; arguments as the product's."""

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        levels: Sequence[int],
        mlp_ratio: float = 4.0,
        multi_scale: bool = False,
        bias_reach: int = 8,
    ) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))]
        self.embed = nn.Conv3d(1, width, 2, 2)
        self.stages = nn.ModuleList(
            nn.ModuleList(PlainBlock(w, n, level, mlp_ratio, multi_scale, bias_reach) for _ in range(depth))
            for w, depth, n, level in zip(widths, depths, heads, levels, strict=True)
        )
        self.merges = nn.ModuleList(PlainMerge(w) for w in widths[:-1])

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of the product's encoder, every entry of it, by the rename map."""
        renamed = {}
        for name, value in state.items():
            if name.startswith("patch_embed."):
                name = name.replace("patch_embed.", "embed.")
            elif name.startswith("stages."):
                _, stage, block, inner = name.split(".", 3)
                if inner == "attention.position_bias":
                    inner, value = "table", value.flatten(0, -2)
                else:
                    stem, _, leaf = inner.rpartition(".")
                    inner = f"{BLOCK_NAMES[stem]}.{leaf}"
                name = f"stages.{stage}.{block}.{inner}"
            renamed[name] = value
        self.load_state_dict(renamed)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.embed(image).permute(0, 2, 3, 4, 1).contiguous()
        maps = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](x)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
            maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3).contiguous())
        return maps


def rotary_angles(grid: Sequence[int], pairs: int) -> Tensor:
    """Angle (n, pairs) of every cell: pair p turns with axis p mod 3, by pi / 2^(1 + p div 3) per cell."""
    cells = torch.cartesian_prod(*[torch.arange(float(size)) for size in grid])
    return torch.stack([cells[:, p % 3] * torch.pi / 2 ** (1 + p // 3) for p in range(pairs)], dim=1)


class PlainAttention(nn.Module):
    """Attention between all positions with rotary angles, softmax and einsum written out.

    Weights are those of the product's coupling; angles (n, e/2): see `rotary_angles`.
    """

    def __init__(self, qkv: nn.Linear, out: nn.Linear, heads: int, angles: Tensor) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.angles = qkv, out, heads, angles

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        tokens = x.reshape(b, c, -1).permute(0, 2, 1)  # (b, n, c)
        query, key, value = self.qkv(tokens).reshape(b, -1, 3, self.heads, c // self.heads).unbind(2)
        query, key = self.turn(query), self.turn(key)
        logits = torch.einsum("bihe,bjhe->bhij", query, key) / (c // self.heads) ** 0.5
        mixed = torch.einsum("bhij,bjhe->bihe", logits.softmax(-1), value).reshape(b, -1, c)
        return self.out(mixed).permute(0, 2, 1).reshape(x.shape)

    def turn(self, t: Tensor) -> Tensor:
        """Channel pair (k, k + e/2) of every head by its angle; t: (b, n, heads, e)."""
        half = t.shape[-1] // 2
        cos, sin = self.angles.cos()[:, None], self.angles.sin()[:, None]
        first, second = t[..., :half], t[..., half:]
        return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)


def plain_kuramoto(
    coupling: Callable[[Tensor], Tensor],
    x0: Tensor,
    stimulus: Tensor,
    oscillator_dim: int,
    steps: int,
    gamma: float,
    frequency: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Kuramoto steps in the paper's order: drive, project, add, rotate, normalise.

    frequency: rad per unit time of every channel pair, as a dense antisymmetric matrix per oscillator.
    Returns the final state (b, c, d, h, w) and the energies before each step (steps, b).
    """
    b, c, d, h, w = x0.shape
    groups = c // oscillator_dim
    x = F.normalize(x0.reshape(b, groups, oscillator_dim, d, h, w), dim=2)
    c_groups = stimulus.reshape(b, groups, oscillator_dim, d, h, w)
    energies = []
    for _ in range(steps):
        y = coupling(x.reshape(b, c, d, h, w)).reshape(x.shape) + c_groups
        similarity = torch.einsum("bgndhw,bgndhw->bgdhw", x, y)
        energies.append(-similarity.sum(dim=(1, 2, 3, 4)))
        projected = y - similarity.unsqueeze(2) * x
        if frequency is not None:
            omega = dense_rotation(frequency, groups, oscillator_dim)
            projected = projected + torch.einsum("gij,bgjdhw->bgidhw", omega, x)
        x = F.normalize(x + gamma * projected, dim=2)
    return x.reshape(b, c, d, h, w), torch.stack(energies)


def dense_rotation(frequency: Tensor, groups: int, n: int) -> Tensor:
    """Omega (groups, n, n): +w at (2k, 2k+1), -w at (2k+1, 2k)."""
    pairs = frequency.reshape(groups, n // 2)
    omega = frequency.new_zeros(groups, n, n)
    even = torch.arange(0, n, 2)
    omega[:, even, even + 1] = pairs
    omega[:, even + 1, even] = -pairs
    return omega
