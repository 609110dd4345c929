"""Attention between all positions of a map: what couples oscillators, or is iterated in their place."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.nets.shapes import expect_map


def position_angles(grid: Sequence[int], pairs: int, like: Tensor) -> Float[Tensor, "n pairs"]:
    """Rotary angles of every cell: pair p encodes axis p mod A of A axes, periods 4, 8, 16, ... cells."""
    axes = [torch.arange(size, device=like.device, dtype=like.dtype) for size in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))  # (n, axes)
    count = len(grid)
    frequencies = torch.tensor([math.pi / 2 ** (1 + p // count) for p in range(pairs)]).to(like)
    return cells[:, [p % count for p in range(pairs)]] * frequencies


@lru_cache(maxsize=16)
def rotary(
    grid: tuple[int, ...], pairs: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "n pairs"], Float[Tensor, "n pairs"]]:
    """Cosine and sine of `position_angles`; kept, as a coupling asks for the same ones at every step."""
    with torch.inference_mode(False):  # what is made in inference could not serve a training
        angles = position_angles(grid, pairs, torch.zeros((), device=device, dtype=dtype))
        return angles.cos(), angles.sin()


def turn(x: Float[Tensor, "*b n d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*b n d"]:
    """Rotate component p of the first half of every head with component p of the second half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class LearnedTurns(nn.Module):
    """A free 2x2 map per position and pair of neighbouring components (2p, 2p+1), on a fixed grid.

    Starts as the rotary rotation for queries, keys and values and as its inverse for the answer: the
    "geometric" positions of the published oscillator networks, with one frequency set per axis here.
    """

    def __init__(self, grid: Sequence[int], head_dim: int) -> None:
        super().__init__()
        angles = position_angles(grid, head_dim // 2, torch.zeros(1))
        cos, sin = angles.cos(), angles.sin()
        forward = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))  # (n, pairs, 2, 2)
        self.query, self.key, self.value = (nn.Parameter(forward.clone()) for _ in range(3))
        self.answer = nn.Parameter(forward.mT.clone())
        self.positions = len(angles)

    def forward(
        self, x: Float[Tensor, "b h n d"], maps: Float[Tensor, "positions p 2 2"]
    ) -> Float[Tensor, "b h n d"]:
        """Components turned by the maps of their position."""
        if x.shape[2] != self.positions:
            raise ValueError(
                f"Learned positions were built for a grid of {self.positions} cells but the map has "
                f"{x.shape[2]}: use maps of the grid they were built for, or positions=rotary."
            )
        return torch.einsum("npij,bhnpj->bhnpi", maps, x.unflatten(3, (-1, 2))).flatten(3)


class AttentionCoupling(nn.Module):
    """J as multi-head attention between all positions of a map with any number of axes.

    Args:
        channels: C. heads: divides C; head h has the C / heads consecutive channels from h C / heads on.
        positions: "rotary" turns queries and keys, so that a score depends on the offset of two positions |
            "learned", see `LearnedTurns`, for one fixed grid | "none".
        axes: spatial axes of the maps, to check that rotary positions fit; one per token sequence.
        grid: for learned positions, the size of the maps.
    Raises:
        ValueError: when heads do not divide the channels, or a head is too narrow for its positions.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        positions: Literal["rotary", "learned", "none"] = "rotary",
        axes: int = 3,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} attention heads do not divide {channels} channels.")
        if positions not in ("rotary", "learned", "none"):
            raise ValueError(f"positions must be 'rotary', 'learned' or 'none', got {positions!r}.")
        if positions == "learned" and grid is None:
            raise ValueError("Learned positions need the grid of the maps: pass grid=(d, h, w).")
        head_dim, axes = channels // heads, len(grid) if grid is not None else axes
        if positions != "none" and (head_dim % 2 or head_dim < 2 * axes):
            raise ValueError(
                f"Attention over {axes}-D positions needs an even number of at least {2 * axes} channels per "
                f"head (a pair per axis), got {channels} channels for {heads} heads. Use fewer heads, more "
                "channels or positions=none."
            )
        self.channels, self.heads, self.rotary = channels, heads, positions == "rotary"
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.turns = LearnedTurns(grid, head_dim) if grid is not None and positions == "learned" else None

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """Couple all positions (quadratic in their number)."""
        expect_map("AttentionCoupling", x, self.channels, axes=None)
        # Products that read and write channels-first maps: a linear layer would copy them to tokens and back.
        flat, b = x.flatten(2), x.shape[0]
        tokens = torch.baddbmm(self.qkv.bias, flat.mT, self.qkv.weight.mT.expand(b, -1, -1))  # (b, n, 3c)
        qkv = tokens.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, b, heads, n, c/heads)
        q, k, v = qkv
        if self.rotary:
            q, k = turn(qkv[:2], *rotary(tuple(x.shape[2:]), q.shape[-1] // 2, q.device, q.dtype))
        if self.turns is not None:
            q, k = self.turns(q, self.turns.query), self.turns(k, self.turns.key)
            v = self.turns(v, self.turns.value)
        mixed = F.scaled_dot_product_attention(q, k, v)
        if self.turns is not None:
            mixed = self.turns(mixed, self.turns.answer)
        answer = mixed.transpose(1, 2).flatten(2).mT  # (b, c, n)
        answer = torch.baddbmm(self.out.bias[:, None], self.out.weight.expand(b, -1, -1), answer)
        return answer.unflatten(2, x.shape[2:])
