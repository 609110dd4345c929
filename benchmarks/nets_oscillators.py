"""Oscillator part of `nets.py`: a Kuramoto step beside its coupling alone, and how cost grows with T.

64 channels on an 8^3 grid, batch 1, as the block has them. Sides: `here` is the product; `plain` the
restatement with the product's weights; `J` calls the product's coupling T times in a row and nothing else.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nets_cases import PLAIN, PRODUCT
from nets_measure import Times, in_turns, ratio
from nets_plain import PlainAttention, plain_kuramoto, rotary_angles
from torch import Tensor, nn

from aneurysm.nets.akorn import KuramotoLayer
from aneurysm.nets.coupling import AttentionCoupling

COUPLING = "J"
CHANNELS, GRID, HEADS, GAMMA = 64, 8, 4, 0.5
TARGET = 1.3  # step / coupling, at most


@dataclass(frozen=True)
class Oscillators:
    """The three sides for one setting; each maps start and stimulus (b, c, d, h, w) to final states."""

    here: Callable[[Tensor, Tensor], Tensor]
    plain: Callable[[Tensor, Tensor], Tensor]
    coupling: Callable[[Tensor, Tensor], Tensor]


def oscillators(connectivity: str, n: int, steps: int, device: str = "cpu") -> Oscillators:
    """Sides that share the weights of one product layer, which rotates channel pairs (n even)."""
    torch.manual_seed(0)
    coupling: Any
    if connectivity == "attention":
        coupling = AttentionCoupling(CHANNELS, HEADS)
    else:
        coupling = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
    layer: Any = KuramotoLayer(CHANNELS, n, coupling, omega="pairs", stimulus_norm="none").to(device)
    plain: Callable[[Tensor], Tensor] = coupling
    if connectivity == "attention":
        angles = rotary_angles((GRID,) * 3, CHANNELS // HEADS // 2).to(device)
        plain = PlainAttention(coupling.qkv, coupling.out, HEADS, angles)

    def alone(x: Tensor, stimulus: Tensor) -> Tensor:
        for _ in range(steps):
            x = coupling(x)
        return x

    return Oscillators(
        lambda x, c: layer(x, c, steps, GAMMA).states[-1],
        lambda x, c: plain_kuramoto(plain, x, c, n, steps, GAMMA, layer.omega.frequency)[0],
        alone,
    )


def check(sides: Oscillators, x: Tensor, c: Tensor) -> float:
    """Largest difference of the final unit vectors; raises RuntimeError beyond float32 rounding."""
    with torch.no_grad():
        apart = float((sides.here(x, c) - sides.plain(x, c)).abs().max())
    if apart > 1e-3:
        raise RuntimeError(f"The restatement is another oscillator: final states differ by {apart:.1e}.")
    return apart


def measure(
    connectivity: str, n: int, steps: int, rounds: int, device: str
) -> tuple[dict[str, Times], dict[str, Times]]:
    """Times of all sides: forward, and forward with backward."""
    sides = oscillators(connectivity, n, steps, device)
    torch.manual_seed(1)
    x, c = (torch.randn(1, CHANNELS, GRID, GRID, GRID, device=device) for _ in range(2))
    check(sides, x, c)
    x.requires_grad_()
    c.requires_grad_()
    named = {PRODUCT: sides.here, PLAIN: sides.plain, COUPLING: sides.coupling}

    def forward(f: Callable[[Tensor, Tensor], Tensor]) -> None:
        with torch.no_grad():
            f(x, c)

    def both(f: Callable[[Tensor, Tensor], Tensor]) -> None:
        f(x, c).square().sum().backward()

    return (
        in_turns({k: (lambda f=f: forward(f)) for k, f in named.items()}, rounds, device),
        in_turns({k: (lambda f=f: both(f)) for k, f in named.items()}, rounds, device),
    )


def line(steps: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of seconds over steps: seconds per step, seconds at none, R^2."""
    slope, start = np.polyfit(steps, seconds, 1)
    left = np.asarray(seconds) - (slope * np.asarray(steps) + start)
    spread = np.asarray(seconds) - np.mean(seconds)
    return float(slope), float(start), float(1 - (left**2).sum() / (spread**2).sum())


def rows(dims: Sequence[int], steps: Sequence[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """One per connectivity, dimension and T."""
    found = []
    for connectivity, n, t in itertools.product(("attention", "conv"), dims, steps):
        forward, both = measure(connectivity, n, t, rounds, device)
        row: dict[str, Any] = {"connectivity": connectivity, "oscillator_dim": n, "steps": t}
        for label, times in (("forward", forward), ("both", both)):
            here, alone = times[PRODUCT], times[COUPLING]
            row |= {
                f"{label}_seconds": here.best,
                f"{label}_coupling_seconds": alone.best,
                f"{label}_to_coupling": ratio(here, alone),
                f"{label}_to_coupling_best": here.best / alone.best,
                f"{label}_plain_to_here": ratio(times[PLAIN], here),
            }
        found.append(row)
    return found


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: every setting, then the straight lines through T."""
    out = [
        "| J | n | T | ms per step | / J (fastest) | plain / here | fwd+bwd, ms per step | / J (fastest) "
        "| plain / here |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        cells = []
        for label in ("forward", "both"):
            cells.append(
                f"{1e3 * r[f'{label}_seconds'] / r['steps']:.2f} | {r[f'{label}_to_coupling']:.2f} "
                f"({r[f'{label}_to_coupling_best']:.2f}) | {r[f'{label}_plain_to_here']:.2f}"
            )
        out.append(f"| {r['connectivity']} | {r['oscillator_dim']} | {r['steps']} | {' | '.join(cells)} |")
    out += [
        "",
        "Straight line through the fastest times over T; a step beside its coupling is the ratio of the "
        f"slopes (at most {TARGET} is asked for).",
        "",
        "| J | n | forward: ms per step | at T = 0 | R^2 | / J | fwd+bwd: ms per step | T = 0 | R^2 | / J |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in lines(found):
        cells = [
            f"{1e3 * r[f'{label}_per_step']:.2f} | {1e3 * r[f'{label}_start']:.2f} | {r[f'{label}_r2']:.4f} "
            f"| {r[f'{label}_slopes']:.2f}"
            for label in ("forward", "both")
        ]
        out.append(f"| {r['connectivity']} | {r['oscillator_dim']} | {' | '.join(cells)} |")
    return "\n".join(out)


def lines(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits over T, one per connectivity and dimension; none from a single T."""
    fits = []
    for connectivity, n in dict.fromkeys((r["connectivity"], r["oscillator_dim"]) for r in found):
        own = [r for r in found if (r["connectivity"], r["oscillator_dim"]) == (connectivity, n)]
        steps = [r["steps"] for r in own]
        if len(steps) < 2:
            continue
        fit: dict[str, Any] = {"connectivity": connectivity, "oscillator_dim": n}
        for label in ("forward", "both"):
            slope, start, r2 = line(steps, [r[f"{label}_seconds"] for r in own])
            alone = line(steps, [r[f"{label}_coupling_seconds"] for r in own])[0]
            fit |= {
                f"{label}_per_step": slope,
                f"{label}_start": start,
                f"{label}_r2": r2,
                f"{label}_slopes": slope / alone,
            }
        fits.append(fit)
    return fits
