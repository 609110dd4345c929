"""Oscillators for a stage of a 3-D transformer, the control that isolates them, and where they are put."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aneurysm.global_batch import own_rows, rows_in_all
from aneurysm.nets.akorn import KuramotoLayer, Readout, convolution, order_per_group, synchrony
from aneurysm.nets.coupling import AttentionCoupling
from aneurysm.nets.shapes import expect_map

Placement = Literal["after_mlp", "before_mlp", "in_attention"]


@dataclass(frozen=True, eq=False)
class OscillatorState:
    """Where the oscillators of a block ended, and how they got there. Energies are means per oscillator."""

    order_parameter: Float[Tensor, "b"]  # mean over groups of R_g, [0, 1]
    order_per_group: Float[Tensor, "b g"]  # R_g
    synchrony: Float[Tensor, "b"]  # the order parameter corrected for chance, [0, 1]
    energies: Float[Tensor, "steps b"]  # -<x, Jx + c> before each step
    lyapunov: Float[Tensor, "steps b"]  # -1/2 <x, Jx> - <c, x> before each step
    x: Float[Tensor, "b c d h w"]  # final unit vectors


class PooledBlock(nn.Module):
    """What oscillators and their control share: pool a map, work on the small grid, add what came out.

    The map is average-pooled to at most `grid` cells (never enlarged), answered on that grid in `channels`
    features, upsampled trilinearly and added through a gate: h + alpha * answer. `alpha` holds one number per
    channel; it starts at zero, so that a net begins as the one without the block.
    """

    def __init__(self, channels: int, grid: Sequence[int] | int, alpha: float) -> None:
        super().__init__()
        self.channels = channels
        self.grid: tuple[int, ...] = (grid,) * 3 if isinstance(grid, int) else tuple(int(n) for n in grid)
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"The grid of oscillators needs three sides of at least 1, got {self.grid}.")
        self.alpha = nn.Parameter(torch.full((channels,), float(alpha)))

    def pool(self, x: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c p q r"]:
        """The map on the small grid, in float32 or better."""
        expect_map(type(self).__name__, x, self.channels)
        p, q, r = (min(size, side) for size, side in zip(x.shape[2:], self.grid, strict=True))
        exact = x if x.dtype == torch.float64 else x.float()
        return F.adaptive_avg_pool3d(exact, (p, q, r)).contiguous()

    def add(
        self, x: Float[Tensor, "b c d h w"], answer: Float[Tensor, "b c p q r"]
    ) -> Float[Tensor, "b c d h w"]:
        """The map with the gated answer added."""
        gated = answer * self.alpha.view(-1, 1, 1, 1)  # on the small grid, where it costs nothing
        if answer.shape != x.shape:
            gated = F.interpolate(gated, x.shape[2:], mode="trilinear", align_corners=False)
        return x + gated.to(x.dtype)


class AkornBlock(PooledBlock):
    """Bind features that belong together by synchronising oscillators.

    The pooled map is projected to a stimulus c (group-normalised per oscillator) and to start vectors x0,
    stepped `steps` times, read out and added to the map, see `PooledBlock`.

    Args:
        channels: of the map.
        oscillator_dim: n, at least 2.
        oscillator_channels: C, rounded up to a multiple of n (with attention also of 2 * heads).
        steps: T. gamma: Euler step; 0.5 converges, 1.0 can oscillate with period two.
        connectivity: "attention" couples all positions, "conv" the 26 neighbours (Conv3d k3).
        grid: largest (d, h, w) of the oscillator field, or one side for all.
        heads: of the attention.
        omega: natural rotation, see `KuramotoLayer`: "auto" | "pairs", for even n | "matrix", for any n |
            "none".
        frequency: every rotation starts at it, rad per unit time.
        alpha: start of the gate.
        noise: standard deviation of normal noise on the start vectors before they are made unit vectors. In
            training fresh at every step; in evaluation the same for every sample, drawn from `noise_seed`, or
            from a seed per sample that the caller gives. 0 (default): the start is a function of the map.
        add_state: the published code's quirk without Omega, see `kuramoto`.
        recompute: keep nothing of the coupling's insides for the backward pass: less memory, more time.
    Raises:
        ValueError: for dimensions that do not fit each other, no steps, or an unknown option.
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
        omega: Literal["auto", "pairs", "matrix", "none"] = "auto",
        frequency: float = 0.1,
        alpha: float = 0.0,
        noise: float = 0.0,
        noise_seed: int = 0,
        add_state: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(channels, grid, alpha)
        if oscillator_dim < 2 or steps < 1 or noise < 0:
            raise ValueError(
                f"Oscillators need a dimension >= 2, a step and no negative noise, got dimension "
                f"{oscillator_dim}, {steps} steps and noise {noise}."
            )
        if connectivity not in ("attention", "conv"):
            raise ValueError(f"connectivity must be 'attention' or 'conv', got {connectivity!r}.")
        multiple = math.lcm(oscillator_dim, 2 * heads) if connectivity == "attention" else oscillator_dim
        width = math.ceil(oscillator_channels / multiple) * multiple
        self.oscillator_dim, self.oscillator_channels = oscillator_dim, width
        self.steps, self.gamma = steps, gamma
        self.noise, self.noise_seed = noise, noise_seed
        self.to_stimulus = nn.Conv3d(channels, width, 1)
        self.to_start = nn.Conv3d(channels, width, 1)
        attends = connectivity == "attention"
        coupling = AttentionCoupling(width, heads) if attends else convolution(3, width, width, 3)
        self.layer = KuramotoLayer(
            width,
            oscillator_dim,
            coupling,
            omega,
            frequency=frequency,
            add_state=add_state,
            recompute=recompute,
        )
        self.readout = Readout(width, channels, oscillator_dim)

    def forward(
        self, x: Float[Tensor, "b c d h w"], seeds: Int[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b c d h w"], OscillatorState]:
        """Features with what the oscillators bound added, and the oscillators' final state.

        seeds: one number per sample for the noise at the start, so that a sample's answer does not depend on
        its neighbours in the batch.
        """
        pooled = self.pool(x)
        start = self.to_start(pooled)
        if self.noise:
            start = start + self.noise * self._noise(start, seeds)
        path = self.layer(start, self.to_stimulus(pooled), self.steps, self.gamma)
        final, positions = path.states[-1], math.prod(pooled.shape[2:])
        per_group = order_per_group(final, self.oscillator_dim)
        order = per_group.mean(1)
        oscillators = positions * self.oscillator_channels // self.oscillator_dim
        state = OscillatorState(
            order,
            per_group,
            synchrony(order, positions),
            path.energies / oscillators,
            path.lyapunov / oscillators,
            final,
        )
        return self.add(x, self.readout(final)), state

    def _noise(self, start: Tensor, seeds: Tensor | None) -> Tensor:
        if seeds is None and self.training:  # this process's part of one draw for the whole batch
            return own_rows(torch.randn(rows_in_all(start), *start.shape[1:], device=start.device)).to(start)
        draws = [
            torch.randn(start.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
            for seed in ([self.noise_seed] if seeds is None else seeds.tolist())
        ]
        return torch.stack(draws).to(start)


class ItrsaBlock(PooledBlock):
    """Iterated self-attention: the control of `AkornBlock` at equal steps and parameters.

    The same pooling, the same attention used `steps` times, but on features, with layer norm before it and a
    residual after it, and no sphere: z <- z + attention(LN z). What oscillators gain over it is theirs.
    Source: the control of the paper (arXiv 2410.13821).

    Args:
        channels: of the map.
        width: of the attended features, rounded up to a multiple of 2 * heads; 88 has as many parameters as
            the defaults of `AkornBlock` on 64 channels.
        steps, grid, heads, alpha, recompute: as in `AkornBlock`.
    """

    def __init__(
        self,
        channels: int,
        width: int = 88,
        steps: int = 4,
        grid: Sequence[int] | int = (8, 8, 8),
        heads: int = 4,
        alpha: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(channels, grid, alpha)
        if steps < 1:
            raise ValueError(f"Iterated attention needs a step, got {steps}.")
        self.width = math.ceil(width / (2 * heads)) * 2 * heads
        self.steps, self.recompute = steps, recompute
        self.to_start = nn.Conv3d(channels, self.width, 1)
        self.norm = nn.LayerNorm(self.width)
        self.attention = AttentionCoupling(self.width, heads)
        self.readout = nn.Conv3d(self.width, channels, 1)

    def forward(self, x: Float[Tensor, "b c d h w"]) -> tuple[Float[Tensor, "b c d h w"], None]:
        """Features with the answer added; there is no oscillator state."""
        z = self.to_start(self.pool(x))
        attend = partial(checkpoint, self._attend, use_reentrant=False) if self.recompute else self._attend
        for _ in range(self.steps):
            z = z + attend(z)
        return self.add(x, self.readout(z)), None

    def _attend(self, z: Tensor) -> Tensor:
        return self.attention(self.norm(z.movedim(1, -1)).movedim(-1, 1))


@dataclass(frozen=True)
class Oscillators:
    """Which block a backbone gets, at which stages, and where inside their last transformer block.

    Args:
        block: called as block(channels=...), gives a module on (b, channels, d, h, w) that returns the map
            and an `OscillatorState` or None.
        strides: of the stages, in voxels per cell.
        placement: "after_mlp" refines what attention and MLP made, the leading hypothesis of the guide |
            "before_mlp" stands between the two | "in_attention" refines the attention's answer before it is
            added to the residual stream.
    Raises:
        ValueError: for an unknown placement.
    """

    block: Callable[..., nn.Module]
    strides: tuple[int, ...] = (8,)
    placement: Placement = "after_mlp"

    def __post_init__(self) -> None:
        if self.placement not in ("after_mlp", "before_mlp", "in_attention"):
            raise ValueError(
                f"Unknown placement {self.placement!r}: use after_mlp, before_mlp or in_attention."
            )


def akorn(strides: Sequence[int] = (8,), placement: Placement = "after_mlp", **settings: Any) -> Oscillators:
    """Kuramoto oscillators: `AkornBlock` with these settings, placed as `Oscillators` says."""
    return Oscillators(partial(AkornBlock, **settings), tuple(strides), placement)


def itrsa(strides: Sequence[int] = (8,), placement: Placement = "after_mlp", **settings: Any) -> Oscillators:
    """Iterated self-attention in the place of oscillators: `ItrsaBlock` with these settings."""
    return Oscillators(partial(ItrsaBlock, **settings), tuple(strides), placement)
