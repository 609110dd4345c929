"""Flows found by training against flows that are known: Poiseuille, Dean, lattice Boltzmann, and a fork.

    OMP_NUM_THREADS=1 python benchmarks/trained_flows.py                       # all: a quarter of an hour
    OMP_NUM_THREADS=1 python benchmarks/trained_flows.py --flows straight bend
    OMP_NUM_THREADS=1 python benchmarks/trained_flows.py --figure flows.png --keep outputs/trained_flows

A network of its own is fitted to each flow by the physics loss alone; it sees nothing of the truth but the
profile at the caps. Prints a markdown table. The residual is the mean square of continuity and momentum at
points that the fit has not seen; times are CPU seconds of the fit. `--keep` stores the networks in a folder
and reads from it what is already there, `--figure` draws the flows. `guide` is the set-up without caps, flux
or wall function, which standing blood solves.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import flow_cases
import numpy as np
import torch
from flow_cases import Case, Fitted
from matplotlib.axes import Axes

from aneurysm.physics.sections import cut_across, star_quadrature
from aneurysm.report.style import BLUE, RED, dress, new_figure

TEST_POINTS = 6000
Place = Callable[[np.ndarray, np.ndarray], np.ndarray]
CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "straight": ("straight tube, caps", flow_cases.straight),
    "straight_free": ("straight tube, flux alone", lambda: flow_cases.straight(caps=False)),
    "guide": ("straight tube, residual and slip alone", flow_cases.guide),
    "bend": ("bend, Dean's caps", flow_cases.bend),
    "sac": ("tube with sac, caps", flow_cases.sac),
    "sac_ramp": ("tube with sac, Reynolds number ramped", lambda: flow_cases.sac(ramp=True)),
    "sac_free": ("tube with sac, flux alone", lambda: flow_cases.sac(caps=False)),
    "fork": ("fork, Murray's caps", flow_cases.fork),
}


@dataclass(frozen=True)
class Found:
    """One quantity of a trained flow beside what it should be."""

    what: str
    value: float
    truth: float | None = None
    percent: bool = False

    def __str__(self) -> str:
        value = f"{100 * self.value:.3g} %" if self.percent else f"{self.value:.4g}"
        return f"{self.what} {value}" + ("" if self.truth is None else f" ({self.truth:.4g})")


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference in the norm of the truth."""
    return float((found - truth).norm() / truth.norm())


def measure(name: str, fitted: Fitted) -> list[Found]:
    """All that is known of one flow."""
    if name.startswith("sac"):
        return measure_sac(fitted)
    return {"bend": measure_bend, "fork": measure_fork}.get(name, measure_tube)(fitted)


def measure_tube(fitted: Fitted) -> list[Found]:
    """Velocity, pressure gradient and wall shear against Poiseuille's, and the loss we judge by."""
    assert fitted.case.truth is not None
    flow = fitted.case.draw(TEST_POINTS, seed=5)
    x, velocity, pressure = fitted.over(flow)
    slope = torch.linalg.lstsq(torch.stack((x[:, 0], torch.ones_like(x[:, 0])), 1), pressure[:, None])
    with torch.no_grad():
        scale = fitted.field.section_flux(fitted.code, flow).scale
        shear = fitted.field.wall_shear(fitted.code, flow, scale)
    return [
        Found("velocity off by", relative(velocity, fitted.case.truth(x)[:, :3]), percent=True),
        Found("dp/dx", float(slope.solution[0]), -8 / flow_cases.TUBE_RE),
        Found("wall shear", float(shear.mean()), 4.0),
        Found("our loss", float(fitted.loss(flow).rows)),
    ]


def measure_bend(fitted: Fitted) -> list[Found]:
    """Velocity, and its part across the axis alone, against Dean's."""
    assert fitted.case.truth is not None
    x, velocity, _ = fitted.over(fitted.case.draw(TEST_POINTS, seed=5))
    truth = fitted.case.truth(x)[:, :3]
    across, exact = (flow_cases.secondary(u, x) for u in (velocity, truth))
    return [
        Found("velocity off by", relative(velocity, truth), percent=True),
        Found("secondary flow off by", relative(across, exact), percent=True),
    ]


def measure_sac(fitted: Fitted) -> list[Found]:
    """The flow in and around a sac against the lattice-Boltzmann solver's."""
    flow = fitted.case.draw(TEST_POINTS, seed=5)
    golden = np.load(flow_cases.GOLDEN)
    points, truth = (torch.as_tensor(golden[name]).double() for name in ("points", "velocity"))
    velocity = torch.as_tensor(fitted.at(points.numpy(), flow))
    inside = flow_cases.in_sac(points)
    x, bulk, _ = fitted.over(flow)
    bulk = bulk[flow_cases.in_sac(x)]
    return [
        Found("velocity off by", relative(velocity, truth), percent=True),
        Found("in the sac", relative(velocity[inside], truth[inside]), percent=True),
        Found("sac speed", float(bulk.norm(dim=1).mean()), float(golden["sac_mean_speed"])),
        Found("backflow", float((bulk[:, 0] < 0).double().mean()), float(golden["sac_backflow_fraction"])),
    ]


def measure_fork(fitted: Fitted) -> list[Found]:
    """How far the flux through cross-sections of each vessel is from what its cap prescribes."""
    flow, domain = fitted.case.draw(TEST_POINTS, seed=5), fitted.case.domain
    found = []
    asked = (("parent", np.pi), ("first daughter", -np.pi / 2), ("second daughter", -np.pi / 2))
    for cap, (vessel, flux) in zip(domain.caps, asked, strict=True):
        start = cap.centre + np.linspace(0.2, 2.2, 8)[:, None] * cap.inward
        normal = np.tile(cap.inward, (len(start), 1))
        star = cut_across(domain.wall, start, normal, np.full(len(start), cap.radius), rays=32)
        position, area = star_quadrature(*star[:3])
        velocity = fitted.at(position.reshape(-1, 3), flow).reshape(position.shape)
        through = (area * (velocity @ cap.inward)).sum(1)
        found.append(Found(f"{vessel}'s flux off by at most", np.abs(through / flux - 1).max(), percent=True))
    return found


def obtain(name: str, case: Case, seed: int, keep: Path | None) -> Fitted:
    """Fit a case, or read what an earlier run has kept of it."""
    path = None if keep is None else keep / f"{name}_{case.fit.steps}_{seed}.pt"
    if path is not None and path.exists():
        stored = torch.load(path, weights_only=True)
        fitted = flow_cases.untrained(case)
        fitted.field.load_state_dict(stored["network"])
        return replace(fitted, seconds=stored["seconds"])
    fitted = flow_cases.fit_case(case, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"network": fitted.field.state_dict(), "seconds": fitted.seconds}, path)
    return fitted


def plane(fitted: Fitted, x: np.ndarray, y: np.ndarray, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Velocity (ny, nx, 3) on a grid that `place` puts into the domain, and which of it is in the lumen."""
    points = place(*np.meshgrid(x, y))
    flat = points.reshape(-1, 3)
    domain = fitted.case.domain
    inside = (domain.wall.interpolate(flat) > 0) & domain.inside(flat)
    velocity = np.full_like(flat, np.nan)
    velocity[inside] = fitted.at(flat[inside], fitted.case.draw(512, seed=5))
    return velocity.reshape(points.shape), inside.reshape(points.shape[:2])


def draw_tube(axes: Axes, fits: dict[str, Fitted]) -> None:
    """Speed along the axis over the distance from it."""
    radius = np.linspace(0, 1, 50)
    axes.plot(radius, 2 * (1 - radius**2), color="black", lw=1, label="Poiseuille")
    for name, colour in (("straight", BLUE), ("guide", RED)):
        if name in fits:
            x, velocity, _ = fits[name].over(fits[name].case.draw(400, seed=5))
            away = x[:, 1:].norm(dim=1)
            axes.plot(away, velocity[:, 0], ".", ms=3, color=colour, label=CASES[name][0])
    dress(axes, "r / R", "u / U", "Straight tube")
    axes.legend(fontsize=7.5, frameon=False)


def draw_bend(axes: Axes, fitted: Fitted) -> None:
    """The cross-section in the middle: trained above, Dean's below."""
    assert fitted.case.truth is not None
    grid = np.linspace(-1, 1, 161)

    def place(out: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack((0 * out, -out, up), axis=-1)

    velocity, inside = plane(fitted, grid, grid, place)
    truth = fitted.case.truth(torch.as_tensor(place(*np.meshgrid(grid, grid))))[..., :3].numpy()
    velocity = np.where((grid > 0)[:, None, None], velocity, np.where(inside[..., None], truth, np.nan))
    axes.imshow(velocity[..., 0], origin="lower", extent=(-1, 1, -1, 1), cmap="viridis")
    s = slice(5, None, 10)
    axes.quiver(grid[s], grid[s], -velocity[s, s, 1], velocity[s, s, 2], color="white", scale=1.2)
    axes.axhline(0, color="white", lw=0.8)
    dress(axes, "inside <- X / R -> outside", "Z / R", "Bend: trained above, Dean below")
    axes.grid(False)


def draw_plane(axes: Axes, fitted: Fitted, x: np.ndarray, y: np.ndarray, across: int, title: str) -> None:
    """Speed and streamlines in the plane of the first axis and axis `across`."""

    def place(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        points = np.zeros((*a.shape, 3))
        points[..., 0], points[..., across] = a, b
        return points

    velocity, inside = plane(fitted, x, y, place)
    speed = np.sqrt(np.linalg.norm(velocity, axis=-1))  # the root shows the slow flow too
    axes.imshow(speed, origin="lower", extent=(x[0], x[-1], y[0], y[-1]), cmap="viridis", vmin=0)
    u, v = (np.where(inside, velocity[..., k], np.nan) for k in (0, across))
    axes.streamplot(x, y, u, v, color="white", linewidth=0.5, density=1.4, arrowsize=0.6)
    dress(axes, "x / R", f"{'xyz'[across]} / R", title)
    axes.grid(False)


def draw(fits: dict[str, Fitted], path: Path) -> None:
    """All flows that there are on one figure."""
    figure = new_figure(10, 6.4)
    axes = figure.subplots(2, 2)
    draw_tube(axes[0, 0], fits)
    if "bend" in fits:
        draw_bend(axes[0, 1], fits["bend"])
    along = np.linspace(-4, 4, 201)
    if "sac" in fits:
        draw_plane(axes[1, 0], fits["sac"], along, np.linspace(-1, 3.4, 111), 2, "Tube with sac")
    if "fork" in fits:
        draw_plane(axes[1, 1], fits["fork"], along, np.linspace(-3.2, 3.2, 161), 1, "Fork")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fit, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flows", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="of every fit, instead of the case's own")
    parser.add_argument("--seed", type=int, default=0, help="of networks and points")
    parser.add_argument("--figure", type=Path, help="where to write a PNG of the velocity fields")
    parser.add_argument("--keep", type=Path, help="folder of networks to write and to read again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fits = {}
    print("| flow | steps | CPU s | residual | found (truth) |\n|---|---|---|---|---|")
    for name in given.flows:
        title, make = CASES[name]
        case = make()
        if given.steps is not None:
            case = replace(case, fit=replace(case.fit, steps=given.steps))
        fits[name] = fitted = obtain(name, case, given.seed, given.keep)
        loss = fitted.loss(case.draw(TEST_POINTS, seed=5))
        residual = float(loss.mass.mean() + loss.force.mean())
        found = ", ".join(str(one) for one in measure(name, fitted))
        print(f"| {title} | {case.fit.steps} | {fitted.seconds:.0f} | {residual:.1e} | {found} |", flush=True)
    if given.figure:
        draw(fits, given.figure)


if __name__ == "__main__":
    main()
