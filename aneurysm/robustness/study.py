"""The flow of every shape, computed again with one assumption changed at a time.

Each time the whole way is gone: mask, vessel graph, exits, flow points, and a small network that is fitted to
this vessel alone, as `PhysicsHead.refine` does.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from aneurysm.physics import flow_domain
from aneurysm.physics.features import FEATURES
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.fluid import BLOOD_DENSITY, BLOOD_VISCOSITY, WALL_SHEAR
from aneurysm.physics.head import PhysicsHead
from aneurysm.physics.network_flow import MURRAY, murray_outflow
from aneurysm.robustness.shapes import scanned
from aneurysm.stages.findings import annotated_place, candidate_flow
from aneurysm.vessels.graph import VesselGraph, build_graph

NUMBERS = ("residual_log10", *FEATURES)
STEPS = 150
CROP = 48  # voxels per side: 24 mm, as the expert sees
LUMEN = 0.5  # of the probability

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """How a flow is computed; without arguments, the base case."""

    kind: str = "base"
    level: str = ""
    mu: float = BLOOD_VISCOSITY  # Pa s
    rho: float = BLOOD_DENSITY  # kg/m^3
    wall_shear_pa: float = WALL_SHEAR
    grown_voxels: float = 0.0  # by which the mask's wall lies too far out
    exponent: float = MURRAY  # of the radius, which sets the flow through each exit; 0 is an equal split
    caps: bool = True
    points: int = 256
    seed: int = 0  # of the network's first weights
    dtype: str = "float64"
    effort: float = 1.0  # steps of the fit, as a multiple of those asked for


BASE = Case()
CASES = (
    *(Case("viscosity", f"×{f:g}", mu=f * BLOOD_VISCOSITY) for f in (0.7, 1.4)),
    *(Case("density", f"×{f:g}", rho=f * BLOOD_DENSITY) for f in (0.7, 1.4)),
    *(Case("wall shear", f"{pa:g} Pa", wall_shear_pa=pa) for pa in (1.0, 2.5)),
    *(Case("mask", f"{v:+g} voxel", grown_voxels=v) for v in (-1.0, -0.5, 0.5, 1.0)),
    Case("split", "r²", exponent=2.0),
    Case("split", "equal", exponent=0.0),
    Case("caps", "none", caps=False),
    *(Case("seed", str(seed), seed=seed) for seed in (1, 2, 3, 4)),
    *(Case("points", str(n), points=n) for n in (64, 128, 512)),
    Case("precision", "float32", dtype="float32"),
    *(Case("steps", f"×{f:g}", effort=f) for f in (3.0, 10.0)),
)
KINDS = tuple(dict.fromkeys(case.kind for case in CASES))

Row = dict[str, float | str | bool]


def with_base(kinds: Sequence[str]) -> list[Case]:
    """The base case and all that change one of these kinds of assumption."""
    return [BASE, *(case for case in CASES if case.kind in kinds)]


def study(shapes: Sequence[str], cases: Sequence[Case], steps: int) -> Iterator[Row]:
    """One row for every shape and case, shape by shape."""
    for shape in shapes:
        for case in cases:
            row = measured(shape, case, steps)
            said = f"residual 10^{row['residual_log10']:.2f}" if row["valid"] else "no flow"
            log.info("%s, %s %s: %s, %.1f s", shape, case.kind, case.level, said, row["seconds"])
            yield row


def measured(shape: str, case: Case, steps: int) -> Row:
    """NUMBERS of a shape in one case; NaN where the mask carries no flow."""
    start = time.perf_counter()
    flow = flow_of(shape, case.grown_voxels, case.exponent, case.points, case.caps)
    head = _head(case, round(steps * case.effort))
    output = head.refine(torch.zeros(1, head.latent_dim), flow)
    valid = bool(flow.valid)
    values = [float(output.residual_log10), *output.features[0].tolist()]
    return {
        "shape": shape, "kind": case.kind, "level": case.level, "steps": head.refine_steps, "valid": valid,
        "driven": bool(flow.driven), "radius_mm": float(flow.radius_mm),
        "reynolds": float(head.reynolds(flow.radius_mm)),
        **{name: value if valid else np.nan for name, value in zip(NUMBERS, values, strict=True)},
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


@cache
def flow_of(shape: str, grown_voxels: float, exponent: float, points: int, caps: bool) -> FlowPoints:
    """The flow points of a shape's candidate, by the pipeline's own way from the mask."""
    vessel, graph = scanned(shape), _graph(shape, grown_voxels)
    probability = {"vessel": vessel.probability(grown_voxels)}
    candidate, rng = annotated_place(graph, vessel.candidate_mm, 1.0), np.random.default_rng(0)
    with _split_by(exponent):
        return candidate_flow(probability, vessel.grid, graph, candidate, LUMEN, CROP, points, caps, rng=rng)


@cache
def _graph(shape: str, grown_voxels: float) -> VesselGraph:
    vessel = scanned(shape)
    return build_graph(vessel.probability(grown_voxels) > LUMEN, vessel.grid)


@contextmanager
def _split_by(exponent: float) -> Iterator[None]:
    """Flow through the exits in proportion to r^exponent; flow domains themselves know Murray's 3 alone."""
    flow_domain.murray_outflow = partial(murray_outflow, exponent=exponent)
    try:
        yield
    finally:
        flow_domain.murray_outflow = murray_outflow


def _head(case: Case, steps: int) -> PhysicsHead:
    """With first weights that depend on the seed alone, in either precision."""

    def made(dtype: str) -> PhysicsHead:
        return PhysicsHead(
            points=case.points,
            dtype=dtype,
            rho=case.rho,
            mu=case.mu,
            wall_shear_pa=case.wall_shear_pa,
            refine_steps=steps,
        )

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        head = made("float64")
        if case.dtype != "float64":
            double, head = head, made(case.dtype)
            head.load_state_dict(double.state_dict())
    return head
