"""Artificial Kuramoto oscillatory neurons on pooled 3-D features.

Notation: C oscillator channels = G groups of n = `oscillator_dim` consecutive channels; a group at one
position is one oscillator, a unit vector in R^n. N positions. J couples positions and channels, c is the
stimulus, Omega the natural rotation, gamma the step. Source: Miyato et al., ICLR 2025, arXiv 2410.13821.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class OscillatorState:
    """Where the oscillators of a block ended, and how they got there."""

    order_parameter: Float[Tensor, "b"]  # [0, 1], see `order_parameter`
    order_per_group: Float[Tensor, "b g"]  # R_g in [0, 1], not corrected for chance
    energies: Float[Tensor, "steps b"]  # before each step; mean per oscillator, so grids compare
    x: Float[Tensor, "b c d h w"]  # final unit vectors


def unit_oscillators(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b c *s"]:
    """Scale every oscillator to length one (the projection Pi)."""
    return F.normalize(x.unflatten(1, (-1, oscillator_dim)), dim=2).flatten(1, 2)


def rotate(x: Float[Tensor, "b c *s"], frequency: Float[Tensor, "pairs"]) -> Float[Tensor, "b c *s"]:
    """Omega x: channel pair (2k, 2k+1) turns with frequency[k], in rad per unit time."""
    pairs = x.unflatten(1, (-1, 2))  # (b, c/2, 2, *s)
    w = frequency.view(1, -1, *(1,) * (x.ndim - 2))
    return torch.stack((w * pairs[:, :, 1], -w * pairs[:, :, 0]), dim=2).flatten(1, 2)


def kuramoto(
    coupling: Callable[[Tensor], Tensor],
    x0: Float[Tensor, "b c *s"],
    stimulus: Float[Tensor, "b c *s"],
    oscillator_dim: int,
    steps: int,
    gamma: float,
    frequency: Float[Tensor, "pairs"] | None = None,
    add_state: bool = False,
) -> tuple[list[Tensor], Float[Tensor, "steps b"]]:
    """Let oscillators pull on each other for a number of Euler steps.

    Per step: y = J(x) + c; x <- Pi(x + gamma (Omega x + y - <x, y> x)), with the energy -sum <x, y> of the
    state before the step. Returns the states after every step and the energies (steps, b).

    `add_state` adds x to the drive, as the published code does when it has no Omega. Because Pi ignores
    scale, that shrinks the effective step to gamma / (1 + gamma): with it gamma 1 means a clean 0.5.
    """
    x = unit_oscillators(x0, oscillator_dim)
    states, energies = [], []
    for _ in range(steps):
        y = coupling(x) + stimulus
        along = (x * y).unflatten(1, (-1, oscillator_dim)).sum(2, keepdim=True)  # (b, g, 1, *s)
        energies.append(-along.flatten(1).sum(1))
        drive = y - (along * x.unflatten(1, (-1, oscillator_dim))).flatten(1, 2)
        if frequency is not None:
            drive = drive + rotate(x, frequency)
        if add_state:
            drive = drive + x
        x = unit_oscillators(x + gamma * drive, oscillator_dim)
        states.append(x)
    return states, torch.stack(energies)


def lyapunov_energy(
    coupling: Callable[[Tensor], Tensor], x: Float[Tensor, "b c *s"], stimulus: Float[Tensor, "b c *s"]
) -> Float[Tensor, "b"]:
    """-1/2 <x, Jx> - <c, x>: never rises for symmetric J, Omega = 0 and a small step."""
    return -(x * (0.5 * coupling(x) + stimulus)).flatten(1).sum(1)


def order_per_group(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b g"]:
    """Kuramoto order R_g = ||mean over positions of x_g||: 1 when a group points one way everywhere."""
    mean = x.flatten(2).mean(2).unflatten(1, (-1, oscillator_dim))  # (b, g, n)
    return torch.linalg.vector_norm(mean, dim=2)


def order_parameter(per_group: Float[Tensor, "b g"], positions: int) -> Float[Tensor, "b"]:
    """One synchrony per sample in [0, 1]: mean over groups of R_g, corrected for chance, clipped.

    Independent random directions give R_g of about 1/sqrt(N), so a smaller grid looks more synchronous
    for nothing. (mean R_g - 1/sqrt(N)) / (1 - 1/sqrt(N)) puts chance at 0 and full synchrony at 1 for any
    grid. Groups are averaged after their R_g: pooling vectors of different groups would mean nothing.
    A single position has no synchrony and gives 0.
    """
    chance = positions**-0.5
    return ((per_group.mean(1) - chance) / max(1 - chance, 1e-6)).clamp(0, 1)


def position_angles(grid: Sequence[int], pairs: int, like: Tensor) -> Float[Tensor, "n pairs"]:
    """Rotary angles of every cell: pair p encodes axis p mod 3, with periods of 4, 8, 16, ... cells."""
    axes = [torch.arange(size, device=like.device, dtype=like.dtype) for size in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)  # (n, 3)
    frequencies = torch.tensor([math.pi / 2 ** (1 + p // 3) for p in range(pairs)]).to(like)
    return cells[:, [p % 3 for p in range(pairs)]] * frequencies


class AttentionCoupling(nn.Module):
    """J as multi-head attention between all positions, with rotary 3-D positions on queries and keys."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        if channels % (2 * heads) or channels // heads < 6:
            raise ValueError(
                f"Attention over 3-D positions needs an even number of at least 6 channels per head (a pair "
                f"per axis), got {channels} channels for {heads} heads. Use fewer heads or more channels."
            )
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
        """Couple all positions (quadratic in d*h*w)."""
        tokens = self.qkv(x.flatten(2).transpose(1, 2))  # (b, n, 3c)
        q, k, v = tokens.unflatten(2, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # each (b, heads, n, c/heads)
        angles = position_angles(x.shape[2:], q.shape[-1] // 2, x)
        cos, sin = angles.cos(), angles.sin()

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        mixed = F.scaled_dot_product_attention(turn(q), turn(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Readout(nn.Module):
    """m_k = ||U_k x + b_k|| + beta_k: how strongly oscillators agree with each learned pattern."""

    def __init__(self, in_channels: int, out_channels: int, oscillator_dim: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.project = nn.Conv3d(in_channels, out_channels * oscillator_dim, 1)  # rows (out, n)
        self.offset = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b k d h w"]:
        """Oscillator channels -> feature channels."""
        patterns = self.project(x).unflatten(1, (self.out_channels, -1))  # (b, k, n, d, h, w)
        return torch.linalg.vector_norm(patterns, dim=2) + self.offset.view(-1, 1, 1, 1)


class AkornBlock(nn.Module):
    """Bind features that belong together by synchronising oscillators, after a transformer stage's MLP.

    The map is average-pooled to `grid` (never upsampled), projected to a stimulus c (group-normalised per
    oscillator) and to start vectors x0 (deterministic, so evaluation is repeatable), stepped `steps` times,
    read out, upsampled and added: h + alpha * readout. Runs in float32 inside autocast, because a
    half-precision normalise of a zero vector is NaN.

    `alpha` is per channel and starts at 0.1, not 0: with 0 the oscillators get no gradient on the first
    step and an adaptive optimiser then amplifies the tiny gradients that follow. `alpha=0` makes the block an
    exact identity at the start.

    Args:
        channels: of the map.
        oscillator_dim: n, at least 2; even with Omega.
        oscillator_channels: C, rounded up to a multiple of n (with attention also of 2 * heads).
        steps: T. gamma: Euler step; 0.5 converges, 1.0 can oscillate with period two.
        connectivity: "attention" couples all positions, "conv" the 26 neighbours (Conv3d k3).
        grid: largest (d, h, w) of the oscillator field, or one side for all.
        use_omega: learned signed rotation per channel pair, started at `omega` rad per unit time.
        add_state: the published code's quirk without Omega, see `kuramoto`.
    Raises:
        ValueError: for an odd oscillator_dim with Omega, dimensions below 2, or no steps.
    """

    def __init__(
        self,
        channels: int,
        oscillator_dim: int = 4,
        oscillator_channels: int = 64,
        steps: int = 4,
        gamma: float = 0.5,
        connectivity: Literal["attention", "conv"] = "attention",
        grid: Sequence[int] | int = (8, 8, 8),
        heads: int = 4,
        use_omega: bool = True,
        omega: float = 0.1,
        alpha: float = 0.1,
        add_state: bool = False,
    ) -> None:
        super().__init__()
        if oscillator_dim < 2 or steps < 1:
            raise ValueError(
                f"Oscillators need a dimension >= 2 and a step, got {oscillator_dim} and {steps}."
            )
        if use_omega and oscillator_dim % 2:
            raise ValueError(
                f"Omega turns pairs of channels, so oscillator_dim must be even, got {oscillator_dim}. "
                "Use an even dimension or use_omega=False."
            )
        if connectivity not in ("attention", "conv"):
            raise ValueError(f"connectivity must be 'attention' or 'conv', got {connectivity!r}.")
        multiple = math.lcm(oscillator_dim, 2 * heads) if connectivity == "attention" else oscillator_dim
        width = math.ceil(oscillator_channels / multiple) * multiple
        self.oscillator_dim, self.oscillator_channels = oscillator_dim, width
        self.steps, self.gamma, self.add_state = steps, gamma, add_state
        self.grid = (grid,) * 3 if isinstance(grid, int) else tuple(int(side) for side in grid)
        self.to_stimulus = nn.Conv3d(channels, width, 1)
        self.to_start = nn.Conv3d(channels, width, 1)
        self.stimulus_norm = nn.GroupNorm(width // oscillator_dim, width)
        if connectivity == "attention":
            self.coupling = AttentionCoupling(width, heads)
        else:
            self.coupling = nn.Conv3d(width, width, 3, padding=1)
        # Signed, where the original takes the norm of a vector: zero then is not a dead point.
        self.frequency = nn.Parameter(torch.full((width // 2,), omega)) if use_omega else None
        self.readout = Readout(width, channels, oscillator_dim)
        self.alpha = nn.Parameter(torch.full((channels,), alpha))

    def forward(self, x: Float[Tensor, "b c d h w"]) -> tuple[Float[Tensor, "b c d h w"], OscillatorState]:
        """Features with what the oscillators bound added, and the oscillators' final state."""
        with torch.autocast(x.device.type, enabled=False):
            full = x if x.dtype == torch.float64 else x.float()
            d, h, w = (min(size, side) for size, side in zip(x.shape[2:], self.grid, strict=True))
            pooled = F.adaptive_avg_pool3d(full, (d, h, w))
            states, energies = kuramoto(
                self.coupling,
                self.to_start(pooled),
                self.stimulus_norm(self.to_stimulus(pooled)),
                self.oscillator_dim,
                self.steps,
                self.gamma,
                self.frequency,
                self.add_state,
            )
            final, positions = states[-1], d * h * w
            bound = F.interpolate(self.readout(final), x.shape[2:], mode="trilinear", align_corners=False)
            out = full + self.alpha.view(-1, 1, 1, 1) * bound
            per_group = order_per_group(final, self.oscillator_dim)
        oscillators = positions * self.oscillator_channels // self.oscillator_dim
        state = OscillatorState(
            order_parameter(per_group, positions), per_group, energies / oscillators, final
        )
        return out.to(x.dtype), state
