"""Voxel vessels with partial volume at the wall: a straight tube in any direction, with or without a sac."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.flow_sampling import sample_flow_points


@dataclass(frozen=True)
class Tube:
    prob: np.ndarray
    spacing: np.ndarray
    path: np.ndarray
    tangent: np.ndarray
    radius: np.ndarray

    def sample(self, seed: int = 0, **sizes: int) -> FlowPoints:
        return sample_flow_points(
            self.prob,
            self.spacing,
            self.path,
            self.tangent,
            self.radius,
            rng=np.random.default_rng(seed),
            **sizes,
        )


def make_tube(
    radius: float = 4.0,
    shape: tuple[int, int, int] = (40, 29, 29),
    axis: tuple[float, float, float] = (1.0, 0.0, 0.0),
    sac: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    offset: float = 0.0,
) -> Tube:
    """Radius and offset in mm; sac = (radius, distance from the axis along h), both in tube radii."""
    fine = 3
    space = np.array(spacing)
    grids = [((np.arange(n * fine) + 0.5) / fine - n / 2) * s for n, s in zip(shape, space, strict=True)]
    x = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    t = np.array(axis) / np.linalg.norm(axis)
    along = x @ t
    inside = ((x - along[..., None] * t) ** 2).sum(-1) < radius**2
    if sac is not None:
        centre = np.array([0.0, sac[1] * radius, 0.0])
        inside |= ((x - centre) ** 2).sum(-1) < (sac[0] * radius) ** 2
    d, h, w = shape
    prob = inside.reshape(d, fine, h, fine, w, fine).mean((1, 3, 5))
    half = 0.85 * min(n * s / 2 / max(abs(c), 1e-9) for n, s, c in zip(shape, space, t, strict=True))
    arc = np.arange(-half, half + 1e-9, 2.0)
    side = np.eye(3)[np.abs(t).argmin()]
    side = side - (side @ t) * t
    path = arc[:, None] * t + offset * side / np.linalg.norm(side)
    return Tube(prob, space, path, np.tile(t, (len(arc), 1)), np.full(len(arc), radius))


@pytest.fixture(scope="session")
def tube() -> Callable[..., Tube]:
    return make_tube


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
