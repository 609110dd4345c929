"""Artificial Kuramoto oscillatory neurons: the rule, its parameters, what is read off it.

Notation: C oscillator channels = G groups of n = `oscillator_dim` consecutive channels; a group at one
position is one oscillator, a unit vector in R^n. Maps are (b, C, *space) with any number of spatial axes;
tokens (b, N, C) are transposed to (b, C, N). J couples positions and channels, c is the stimulus, Omega the
natural rotation, gamma the step. Source: Miyato et al., ICLR 2025, arXiv 2410.13821.

The oscillators for a 3-D transformer stage, built of these parts, are in `oscillators`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from aneurysm.nets.shapes import expect_map

Rotation = Callable[[Tensor, Tensor], Tensor]  # x, y -> y + Omega x


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The way of the oscillators through T Euler steps.

    Energies are those of the state before each step (entry 0 belongs to the start), summed over all
    oscillators of a sample. They are worked out when asked for.
    """

    start: Float[Tensor, "b c *s"]  # unit vectors
    states: list[Tensor]  # T maps (b, c, *s), after every step
    along: list[Tensor]  # T maps (b, g, 1, *s): <x, Jx + c> of every oscillator before the step
    stimulus: Float[Tensor, "b c *s"]

    @property
    def energies(self) -> Float[Tensor, "steps b"]:
        """-<x, Jx + c>, what the paper's code logs."""
        return -torch.stack([along.flatten(1).sum(1) for along in self.along])

    @property
    def lyapunov(self) -> Float[Tensor, "steps b"]:
        """-1/2 <x, Jx> - <c, x>: never rises for symmetric J, Omega = 0 and a small gamma."""
        c = self.stimulus.flatten(1)
        before = (self.start, *self.states[:-1])
        return 0.5 * (self.energies - torch.stack([torch.linalg.vecdot(x.flatten(1), c) for x in before]))


def unit_oscillators(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b c *s"]:
    """Scale every oscillator to length one (the projection Pi); a zero vector stays zero."""
    return _normalise(x.unflatten(1, (-1, oscillator_dim))).flatten(1, 2)


def _normalise(x: Float[Tensor, "b g n *s"]) -> Float[Tensor, "b g n *s"]:
    # As F.normalize with its eps of 1e-12, whose norm along a short inner axis is slow.
    return x * _inverse_length(x)


def _inverse_length(x: Float[Tensor, "b g n *s"]) -> Float[Tensor, "b g 1 *s"]:
    return (x * x).sum(2, keepdim=True).clamp(min=1e-24).rsqrt()


def rotate(x: Float[Tensor, "b c *s"], frequency: Float[Tensor, "pairs"]) -> Float[Tensor, "b c *s"]:
    """Omega x of the published code: channel pair (2k, 2k+1) turns with frequency[k], rad per unit time.

    (Omega x)_2k = +w x_2k+1 and (Omega x)_2k+1 = -w x_2k. One frequency serves all pairs.
    """
    return add_rotation(x, torch.zeros_like(x), torch.stack((frequency, -frequency), dim=-1))


def add_rotation(
    x: Float[Tensor, "b c *s"], y: Float[Tensor, "b c *s"], signed: Float[Tensor, "pairs 2"]
) -> Float[Tensor, "b c *s"]:
    """y + Omega x, see `rotate`; `signed` holds (w, -w) per pair, or once for all."""
    swapped = x.unflatten(1, (-1, 2)).flip(2)  # (b, c/2, 2, *s)
    signed = signed[..., *(None,) * (x.ndim - 2)]
    return torch.addcmul(y.unflatten(1, (-1, 2)), swapped, signed).flatten(1, 2)


def advance(
    x: Float[Tensor, "b g n *s"], y: Float[Tensor, "b g n *s"], gamma: float | Tensor, add_state: bool
) -> tuple[Float[Tensor, "b g n *s"], Float[Tensor, "b g 1 *s"]]:
    """Pi(x + gamma (y - <x, y> x)) and <x, y>, of unit vectors x pulled by y."""
    # A compiler fuses what `_Advance` fuses by hand.
    if isinstance(gamma, Tensor) or gamma <= 0 or torch.compiler.is_compiling():
        along = (x * y).sum(2, keepdim=True)
        return _normalise((1 + gamma * (float(add_state) - along)) * x + gamma * y), along
    return _Advance.apply(x, y, gamma, add_state)


class _Advance(torch.autograd.Function):
    """`advance` with its gradient in a third of the passes over memory that autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gamma: float, add_state: bool) -> tuple[Tensor, Tensor]:
        along = (x * y).sum(2, keepdim=True)
        # Divided by gamma, as the length does not count.
        share = torch.rsub(along, 1 / gamma + float(add_state))
        moved = torch.addcmul(y, x, share)
        inverse = _inverse_length(moved)
        after = moved.mul_(inverse)
        ctx.save_for_backward(x, y, share, inverse, after)
        return after, along

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, share, inverse, after = ctx.saved_tensors
        of_after, of_along = grads
        # through the length, then through the sum
        of_moved = torch.addcmul(of_after, (of_after * after).sum(2, keepdim=True), after, value=-1)
        of_moved = of_moved.mul_(inverse)
        of_along = of_along - (of_moved * x).sum(2, keepdim=True)
        of_x = (of_moved * share).addcmul_(of_along, y)
        return of_x, of_moved.addcmul_(of_along, x), None, None


def kuramoto(
    coupling: Callable[[Tensor], Tensor],
    x0: Float[Tensor, "b c *s"],
    stimulus: Float[Tensor, "b c *s"],
    oscillator_dim: int,
    steps: int,
    gamma: float | Tensor,
    rotation: Rotation | None = None,
    add_state: bool = False,
    recompute: bool = False,
) -> Trajectory:
    """Let oscillators pull on each other for a number of Euler steps.

    Per step: y = J(x) + c; x <- Pi(x + gamma (Omega x + y - <x, y> x)). The start is Pi(x0).

    `add_state` adds x to the drive, as the published code does when it has no Omega. Because Pi ignores
    scale, that shrinks the effective step to gamma / (1 + gamma): with it gamma 1 means a clean 0.5.

    Under autocast the coupling runs in the lower precision; the state, its projection and its normalisation
    stay in float32 (or float64), because a half-precision normalisation of a zero vector is NaN.

    Args:
        coupling: J, a map (b, c, *s) to one of the same shape.
        rotation: x, y -> y + Omega x, or None for Omega = 0.
        recompute: work the coupling out again in the backward pass instead of keeping its insides.
    Raises:
        ValueError: start and stimulus differ in shape, or the channels are no multiple of oscillator_dim.
    """
    if x0.shape != stimulus.shape or x0.ndim < 2 or x0.shape[1] % oscillator_dim:
        raise ValueError(
            f"Oscillators of dimension {oscillator_dim} got a start of shape {tuple(x0.shape)} and a "
            f"stimulus of shape {tuple(stimulus.shape)}: expected the same (b, c, *space), c a multiple "
            f"of {oscillator_dim}."
        )
    pull = partial(checkpoint, coupling, use_reentrant=False) if recompute else coupling
    groups = (x0.shape[0], -1, oscillator_dim, *x0.shape[2:])
    exact = torch.float64 if x0.dtype == torch.float64 else torch.float32
    device = x0.device.type
    with torch.autocast(device, enabled=False):
        x = _normalise(x0.to(exact).reshape(groups))  # (b, g, n, *s)
        c = stimulus.to(exact).reshape(groups)
    path = Trajectory(x.flatten(1, 2), [], [], c.flatten(1, 2))
    for _ in range(steps):
        drive = pull(x.flatten(1, 2))
        with torch.autocast(device, enabled=False):
            y = c + drive.reshape(groups)  # float32 also where the coupling answered in bfloat16
            if rotation is not None:
                y = rotation(x.flatten(1, 2), y.flatten(1, 2)).reshape(groups)
            # Omega x is at right angles to x, so it neither changes <x, y> nor needs to be projected.
            x, along = advance(x, y, gamma, add_state)
        path.states.append(x.flatten(1, 2))
        path.along.append(along)
    return path


def lyapunov_energy(
    coupling: Callable[[Tensor], Tensor], x: Float[Tensor, "b c *s"], stimulus: Float[Tensor, "b c *s"]
) -> Float[Tensor, "b"]:
    """-1/2 <x, Jx> - <c, x>: never rises for symmetric J, Omega = 0 and a small step."""
    return -(x * (0.5 * coupling(x) + stimulus)).flatten(1).sum(1)


def order_per_group(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b g"]:
    """Kuramoto order R_g = ||mean over positions of x_g||: 1 when a group points one way everywhere.

    N independent random directions give about 1/sqrt(N).
    """
    return torch.linalg.vector_norm(_by_group(x, oscillator_dim).mean(3), dim=2)


def _by_group(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b g n positions"]:
    return x.reshape(x.shape[0], -1, oscillator_dim, math.prod(x.shape[2:]))


def order_parameter(x: Float[Tensor, "b c *s"], oscillator_dim: int) -> Float[Tensor, "b"]:
    """Mean over groups of R_g, in [0, 1].

    Groups are averaged after their R_g: pooling vectors of different groups would mean nothing.
    """
    return order_per_group(x, oscillator_dim).mean(1)


def synchrony(order: Float[Tensor, "b"], positions: int) -> Float[Tensor, "b"]:
    """The order parameter corrected for chance and clipped to [0, 1].

    A smaller grid looks more synchronous for nothing: (R - 1/sqrt(N)) / (1 - 1/sqrt(N)) puts chance at 0 and
    full synchrony at 1 for any number N of positions. A single position has no synchrony and gives 0.
    """
    chance = positions**-0.5
    return ((order - chance) / max(1 - chance, 1e-6)).clamp(0, 1)


class PairRotation(nn.Module):
    """Omega as one rotation per pair of channels, the published form; needs an even oscillator_dim.

    Frequencies are signed, where the original takes the norm of a vector: zero is then no dead point, and
    both senses of rotation can be learned.
    """

    def __init__(self, channels: int, frequency: float, shared: bool = False) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((1 if shared else channels // 2,), frequency))  # rad / time

    def rotation(self) -> Rotation:
        """x, y -> y + Omega x."""
        return partial(add_rotation, signed=torch.stack((self.frequency, -self.frequency), dim=-1))


class MatrixRotation(nn.Module):
    """Omega as a free antisymmetric n x n matrix per group, for any n (odd ones keep at least one axis).

    Starts as `PairRotation` does: axes (0, 1), (2, 3), ... turn, a last odd axis rests.
    """

    def __init__(self, channels: int, oscillator_dim: int, frequency: float, shared: bool = False) -> None:
        super().__init__()
        upper = torch.zeros(oscillator_dim, oscillator_dim)
        pairs = torch.arange(0, oscillator_dim - 1, 2)
        upper[pairs, pairs + 1] = frequency
        self.oscillator_dim = oscillator_dim
        rows, columns = torch.triu_indices(oscillator_dim, oscillator_dim, 1)
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        groups = 1 if shared else channels // oscillator_dim
        self.upper = nn.Parameter(upper[rows, columns].repeat(groups, 1))  # (g, n (n - 1) / 2), rad / time

    def matrix(self) -> Float[Tensor, "g n n"]:
        """The antisymmetric matrices."""
        n = self.oscillator_dim
        square = self.upper.new_zeros(len(self.upper), n, n)
        square[:, self.rows, self.columns] = self.upper
        return square - square.mT

    def rotation(self) -> Rotation:
        """x, y -> y + Omega x, with the matrices worked out once."""
        matrix = self.matrix()

        def apply(x: Tensor, y: Tensor) -> Tensor:
            return y + torch.matmul(matrix, _by_group(x, self.oscillator_dim)).view_as(x)

        return apply


class ScaleBias(nn.Module):
    """A scale and a bias per channel, the published alternative ("sandb") to normalising the stimulus."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, c: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        shape = (-1, *(1,) * (c.ndim - 2))
        return c * self.weight.view(shape) + self.bias.view(shape)


class KuramotoLayer(nn.Module):
    """Oscillators with a coupling, a natural rotation and a normalisation of the stimulus.

    Args:
        channels: C, a multiple of oscillator_dim.
        oscillator_dim: n, at least 2.
        coupling: J; `AttentionCoupling`, a convolution of equal size, or any module on (b, C, *space).
        omega: "pairs", the published form, for even n | "matrix", antisymmetric, for any n | "auto", the
            first of the two that fits | "none".
        shared_omega: one frequency (or matrix) for all groups.
        frequency: every rotation starts at it, rad per unit time.
        stimulus_norm: "group", statistics over an oscillator's components and all positions | "scale_bias" |
            "none".
        add_state: the published code's quirk without Omega, see `kuramoto`.
        recompute: keep nothing of the coupling's insides for the backward pass.
    Raises:
        ValueError: for dimensions that do not fit, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        oscillator_dim: int,
        coupling: nn.Module,
        omega: Literal["auto", "pairs", "matrix", "none"] = "auto",
        shared_omega: bool = False,
        frequency: float = 0.1,
        stimulus_norm: Literal["group", "scale_bias", "none"] = "group",
        add_state: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if oscillator_dim < 2 or channels % oscillator_dim:
            raise ValueError(
                f"Oscillators need a dimension >= 2 that divides the channels, got {oscillator_dim} for "
                f"{channels} channels."
            )
        if omega == "pairs" and oscillator_dim % 2:
            raise ValueError(
                f"omega=pairs turns pairs of channels, so oscillator_dim must be even, got {oscillator_dim}. "
                "Use omega=matrix, or none."
            )
        self.channels, self.oscillator_dim = channels, oscillator_dim
        self.add_state, self.recompute = add_state, recompute
        self.coupling = coupling
        self.omega: PairRotation | MatrixRotation | None
        if omega == "auto":
            omega = "matrix" if oscillator_dim % 2 else "pairs"
        if omega == "pairs":
            self.omega = PairRotation(channels, frequency, shared_omega)
        elif omega == "matrix":
            self.omega = MatrixRotation(channels, oscillator_dim, frequency, shared_omega)
        elif omega == "none":
            self.omega = None
        else:
            raise ValueError(f"omega must be 'auto', 'pairs', 'matrix' or 'none', got {omega!r}.")
        self.stimulus_norm: nn.Module
        if stimulus_norm == "group":
            self.stimulus_norm = nn.GroupNorm(channels // oscillator_dim, channels)
        elif stimulus_norm == "scale_bias":
            self.stimulus_norm = ScaleBias(channels)
        elif stimulus_norm == "none":
            self.stimulus_norm = nn.Identity()
        else:
            raise ValueError(f"stimulus_norm must be 'group', 'scale_bias' or 'none', got {stimulus_norm!r}.")

    def forward(
        self,
        x0: Float[Tensor, "b c *s"],
        stimulus: Float[Tensor, "b c *s"],
        steps: int,
        gamma: float | Tensor,
    ) -> Trajectory:
        """The way from Pi(x0) under the normalised stimulus."""
        expect_map("KuramotoLayer (start)", x0, self.channels, axes=None)
        expect_map("KuramotoLayer (stimulus)", stimulus, self.channels, axes=None)
        return kuramoto(
            self.coupling,
            x0,
            self.stimulus_norm(stimulus),
            self.oscillator_dim,
            steps,
            gamma,
            self.omega.rotation() if self.omega is not None else None,
            self.add_state,
            self.recompute,
        )


class Readout(nn.Module):
    """m_k = ||U_k x + b_k|| + beta_k: how strongly oscillators agree with each learned pattern.

    Args:
        in_channels: of the oscillators. out_channels: patterns k.
        pattern_dim: dimension of U_k x; the rows of U are ordered (pattern, dimension).
        kernel_size: side of U in positions, odd.
        axes: spatial axes of the map, 1 to 3; tokens have one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pattern_dim: int, kernel_size: int = 1, axes: int = 3
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.axes = in_channels, out_channels, axes
        self.project = convolution(axes, in_channels, out_channels * pattern_dim, kernel_size)
        self.offset = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Oscillator channels -> feature channels."""
        expect_map("Readout", x, self.in_channels, self.axes)
        patterns = self.project(x).unflatten(1, (self.out_channels, -1))  # (b, k, n, *s)
        exact = torch.promote_types(patterns.dtype, torch.float32)  # lengths of bfloat16 have three digits
        return torch.linalg.vector_norm(patterns, dim=2, dtype=exact) + self.offset.view(
            -1, *(1,) * self.axes
        )


def convolution(axes: int, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """Convolution over 1, 2 or 3 spatial axes that keeps the size of the map; as J with in = out channels."""
    if axes not in (1, 2, 3) or kernel_size % 2 == 0:
        raise ValueError(
            f"A convolution that keeps its map needs 1 to 3 axes and an odd kernel, got {axes} axes and "
            f"kernel {kernel_size}."
        )
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return kind(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
