"""Reference flow in a tube with a spherical sac: a lattice-Boltzmann solver of its own, no learning in it.

    python benchmarks/flow_reference.py                                   # both flows at 10 nodes per radius
    python benchmarks/flow_reference.py --nodes 10 14 20 --out tests/physics/golden_sac_flow.npz

The first flow is a straight tube, held against Poiseuille; the second the same tube with a sac on its side.
Lengths are in tube radii R, speeds in mean tube speeds U; the tube runs along x from -4 to 4, the sac of
radius 1.3 sits at (0, 0, 2.04), and Re = U R / nu = 32. The lumen is the union of tube and sphere, which is
where `a + b + sqrt(a^2 + b^2)` is positive for any a and b positive inside the tube and inside the sphere.

Method: D3Q19 with two relaxation times (magic parameter 3/16), the incompressible equilibrium, linearly
interpolated bounce-back at the wall's exact distance along each link, Poiseuille's profile at the inlet and
constant pressure at the outlet. `--halfway` puts every wall half-way between nodes instead, which shows the
error of a staircase. Two lines are printed per resolution; `--out` keeps the finest.

With numba 10 nodes per radius take half a minute on one core, 20 take five minutes (the fourth power of the
nodes); without it two to three times that.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

try:
    from numba import njit
except ImportError:
    njit = None

Array = np.ndarray

HALF_LENGTH = 4.0  # R
SAMPLE_HALF_LENGTH = 3.5  # R: samples keep away from inlet and outlet
MAGIC = 3 / 16  # with it a half-way wall lies exactly half-way, whatever the viscosity
BLOCK = 4096  # nodes per block: their populations stay in the cache
MOVES = np.array(
    [
        *([0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]),
        *([1, 1, 0], [-1, -1, 0], [1, -1, 0], [-1, 1, 0], [1, 0, 1], [-1, 0, -1]),
        *([1, 0, -1], [-1, 0, 1], [0, 1, 1], [0, -1, -1], [0, 1, -1], [0, -1, 1]),
    ]
)  # after rest, opposite moves are neighbours: 1 and 2, 3 and 4, ...
OPPOSITE = np.array([0, *(q + 1 if q % 2 else q - 1 for q in range(1, 19))])
WEIGHTS = np.array([1 / 3, *[1 / 18] * 6, *[1 / 36] * 12])


@dataclass(frozen=True)
class Setting:
    """How a flow is put on a lattice."""

    nodes: int  # per R
    reynolds: float  # U R / nu
    speed: float  # U in lattice units (spacings per step)
    halfway: bool = False  # walls half-way between nodes instead of where they are

    @property
    def spacing(self) -> float:
        """Distance of two nodes in R."""
        return 1 / self.nodes

    @property
    def viscosity(self) -> float:
        """In lattice units."""
        return self.speed * self.nodes / self.reynolds

    @property
    def tau_even(self) -> float:
        """Relaxation time in steps of the populations' even part; it sets the viscosity."""
        return 0.5 + 3 * self.viscosity

    @property
    def tau_odd(self) -> float:
        """Relaxation time in steps of the odd part; with the even one's it sets where walls are felt."""
        return 0.5 + MAGIC / (3 * self.viscosity)


@dataclass(frozen=True)
class Vessel:
    """A tube of radius 1 along x, with a spherical sac unless its radius is zero; lengths in R."""

    sac_radius: float = 0.0
    sac_height: float = 2.04

    @property
    def sac_centre(self) -> Array:
        return np.array([0.0, 0.0, self.sac_height])

    def depth(self, points: Array) -> Array:
        """A lower bound of the distance to the wall in R, positive exactly inside the lumen."""
        tube = 1 - np.hypot(points[:, 1], points[:, 2])
        if not self.sac_radius:
            return tube
        return np.maximum(tube, self.sac_radius - np.linalg.norm(points - self.sac_centre, axis=1))

    def box(self) -> tuple[Array, Array]:
        """Lower and upper corner of a box around the lumen in R."""
        side = max(1.0, self.sac_radius)
        top = self.sac_height + self.sac_radius if self.sac_radius else 1.0
        return np.array([-HALF_LENGTH, -side, -1.0]), np.array([HALF_LENGTH, side, top])

    def exit_distance(self, points: Array, step: Array) -> Array:
        """How many steps (vectors in R) a point of the lumen may go before it meets the wall."""
        spans = [chord(points[:, 1:], step[1:], 1.0)]
        if self.sac_radius:
            spans.append(chord(points - self.sac_centre, step, self.sac_radius))
        reached = np.zeros(len(points))
        for near, far in spans * 2:  # out of one shape the way may lead on through the other
            reached = np.where((near <= reached) & (reached <= far), far, reached)
        return reached


@dataclass(frozen=True)
class Nodes:
    """The fluid nodes of a vessel."""

    points: Array  # (n, 3) in R
    cells: Array  # (n, 3) their places in `index`
    index: Array  # dense grid with a margin of one or more: the node's number, -1 in the wall
    origin: Array  # (3,) in R: where the first entry of `index` lies


@dataclass(frozen=True)
class Links:
    """The m populations that come back from walls and ends; flat places are `move * n + node`.

    Each is `first_share * f[first] + second_share * f[second] + added`.
    """

    first: Array
    first_share: Array
    second: Array
    second_share: Array
    added: Array
    outlet: Array  # (k,) which of the links lie at the outlet, ...
    outlet_nodes: Array  # (k,) ... at which nodes ...
    outlet_moves: Array  # (k,) ... and along which move they come in


@dataclass(frozen=True)
class Ghosts:
    """Places in the wall beside the fluid, and the velocity continued to them."""

    cells: Array  # (g, 3) places of `Nodes.index`; several ghosts may share one
    nodes: Array  # (g,) fluid nodes whose velocity ...
    shares: Array  # (g,) ... times this is the ghost's


@dataclass(frozen=True)
class Lattice:
    """Nodes, links and where each population comes from."""

    setting: Setting
    nodes: Nodes
    source: Array  # (19, n) flat place of the population that arrives; from 19 n on, the links
    links: Links
    ghosts: Ghosts


@dataclass(frozen=True)
class Flow:
    """A steady flow on the nodes of a lattice."""

    lattice: Lattice
    velocity: Array  # (n, 3) in U
    steps: int
    seconds: float  # CPU time


def poiseuille(points: Array) -> Array:
    """The velocity (n, 3) in U of a tube of radius 1; zero outside."""
    speed = 2 * np.clip(1 - points[:, 1] ** 2 - points[:, 2] ** 2, 0, None)
    return np.stack([speed, 0 * speed, 0 * speed], axis=1)


def chord(offset: Array, step: Array, radius: float) -> tuple[Array, Array]:
    """The first and last number of steps at which a line from a centre's offset is within the radius."""
    square, mixed = (step**2).sum(), offset @ step
    rest = (offset**2).sum(1) - radius**2
    if square == 0:
        return np.where(rest < 0, -np.inf, np.inf), np.where(rest < 0, np.inf, -np.inf)
    root = mixed**2 - square * rest
    half = np.sqrt(np.clip(root, 0, None))
    near, far = (-mixed - half) / square, (-mixed + half) / square
    return np.where(root > 0, near, np.inf), np.where(root > 0, far, -np.inf)


def place_nodes(vessel: Vessel, per_radius: int) -> Nodes:
    """Fill a vessel with nodes; the axis and both ends fall half-way between them."""
    low, high = vessel.box()
    start = np.floor(low * per_radius).astype(int) - 1
    shape = np.ceil(high * per_radius).astype(int) + 1 - start
    origin = (start + 0.5) / per_radius
    cells = np.stack(np.indices(shape), axis=-1).reshape(-1, 3)
    points = origin + cells / per_radius
    inside = (np.abs(points[:, 0]) < HALF_LENGTH) & (vessel.depth(points) > 0)
    cells, points = cells[inside], points[inside]
    index = np.full(shape, -1)
    index[tuple(cells.T)] = np.arange(len(cells))
    return Nodes(points, cells, index, origin)


def build_lattice(vessel: Vessel, setting: Setting) -> Lattice:
    """Find out for each node and move where the population comes from: a node, a wall or an end."""
    nodes, h = place_nodes(vessel, setting.nodes), setting.spacing
    points, n = nodes.points, len(nodes.points)
    neighbour = np.stack([nodes.index[tuple((nodes.cells + move).T)] for move in MOVES])
    free = np.stack([vessel.exit_distance(points, move * h) for move in MOVES])
    free[0] = np.inf  # rest meets no wall
    beyond = np.abs(points[:, 0] + MOVES[:, :1] * h) > HALF_LENGTH
    end = beyond & (free >= 0.5)  # an end comes half-way; the wall may come before it
    wall = ~end & ((free < 1) | (neighbour < 0))

    # What arrives along q has left along the opposite: the link is named by q, its wall lies the other way.
    q, i = np.nonzero((wall | end)[OPPOSITE])
    out = OPPOSITE[q]
    source = np.arange(19)[:, None] * n + neighbour[OPPOSITE]
    source[q, i] = 19 * n + np.arange(len(q))

    distance = np.clip(free[out, i], 0, 1)
    behind = np.where((wall | end)[q, i], -1, neighbour[q, i])
    at_outlet = end[out, i] & (MOVES[out, 0] > 0)
    at_inlet = end[out, i] & ~at_outlet
    # Half-way bounce-back at the ends, and where interpolation lacks the node behind.
    lacking = (distance < 0.5) & (behind < 0)
    used = np.where(end[out, i] | lacking | setting.halfway, 0.5, distance)
    share = np.where(used < 0.5, 2 * used, 0.5 / np.maximum(used, 0.5))
    links = Links(
        first=out * n + i,
        first_share=np.where(at_outlet, -1, share),
        second=np.where(used < 0.5, out * n + behind, q * n + i),
        second_share=1 - share,
        added=np.where(at_inlet, inflow(points[i], out, setting), 0),
        outlet=np.flatnonzero(at_outlet),
        outlet_nodes=i[at_outlet],
        outlet_moves=q[at_outlet],
    )
    # Beyond a wall the velocity goes on linearly from the wall's zero; the slope is taken from the farther of
    # two nodes where the nearer one almost touches the wall.
    ghost = wall[out, i] & (neighbour[out, i] < 0) & ~lacking
    far = distance < 0.5
    shares = -(1 - distance) / np.where(far, 1 + distance, np.maximum(distance, 0.5))
    ghosts = Ghosts((nodes.cells[i] + MOVES[out])[ghost], np.where(far, behind, i)[ghost], shares[ghost])
    return Lattice(setting, nodes, source, links, ghosts)


def inflow(points: Array, out: Array, setting: Setting) -> Array:
    """What bounce-back at the inlet adds to the populations that left the nodes along `out`.

    With only the momentum of the profile half-way, the flow enters several per cent off Poiseuille. To second
    order along the link, `D` the derivative along it and e+, e- the even and the odd part of Poiseuille's
    equilibrium, steady populations call for `-2 e- + (2 tau_odd - 1) D e+ + (1/4 - 2 MAGIC) D^2 e-`.
    """
    h, speed, weight = setting.spacing, setting.speed, WEIGHTS[out]
    middle = points + 0.5 * h * MOVES[out]
    across = MOVES[out, 1:]
    profile = speed * poiseuille(middle)[:, 0]
    slope = -4 * speed * h * (middle[:, 1:] * across).sum(1)
    curvature = -4 * speed * h**2 * (across**2).sum(1)
    pressure_drop = 24 * setting.viscosity * speed * h**2  # of the density, per node
    odd, odd_second = -3 * weight * profile, -3 * weight * curvature
    even_first = weight * (pressure_drop + 6 * profile * slope)
    return -2 * odd + (2 * setting.tau_odd - 1) * even_first + (0.25 - 2 * MAGIC) * odd_second


def arrivals(links: Links, f: Array, n: int) -> Array:
    """The populations that come back from walls, inlet and outlet.

    The outlet reflects with the sign turned, about the equilibrium of zero pressure. That takes the velocity
    of the moment: a prescribed one would fix p + u^2 instead, and where the flow slows down push it back.
    """
    result = links.first_share * f[links.first] + links.second_share * f[links.second] + links.added
    velocity = f[: 19 * n].reshape(19, n)[:, links.outlet_nodes].T @ MOVES
    along = (velocity * MOVES[links.outlet_moves]).sum(1)
    even = 4.5 * along**2 - 1.5 * (velocity**2).sum(1)
    result[links.outlet] += 2 * WEIGHTS[links.outlet_moves] * even
    return result


def relax_arrays(f: Array, g: Array, source: Array, even: float, odd: float) -> None:
    """One step from `f` to `g`: fetch what arrives at each node and relax it.

    The even part of the populations relaxes by `even`, the odd part by `odd`. The equilibrium is the
    incompressible one: the density carries the pressure only, so its slope along the tube costs no accuracy.
    """
    n = source.shape[1]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        p = f[source[:, start:stop]]
        velocity = MOVES.T @ p
        still = p.sum(0) - 1.5 * (velocity**2).sum(0)
        g[start:stop] = p[0] - even * (p[0] - WEIGHTS[0] * still)
        for q in range(1, 19, 2):
            along = MOVES[q] @ velocity
            to_even = even * (0.5 * (p[q] + p[q + 1]) - WEIGHTS[q] * (still + 4.5 * along**2))
            to_odd = odd * (0.5 * (p[q] - p[q + 1]) - WEIGHTS[q] * 3 * along)
            g[q * n + start : q * n + stop] = p[q] - to_even - to_odd
            g[(q + 1) * n + start : (q + 1) * n + stop] = p[q + 1] - to_even + to_odd


def relax_loops(f: Array, g: Array, source: Array, even: float, odd: float) -> None:
    """The same for numba, which makes faster code of loops than of arrays."""
    n = source.shape[1]
    p = np.empty((19, BLOCK))
    still, ux, uy, uz = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        still[:], ux[:], uy[:], uz[:] = 0, 0, 0, 0
        for q in range(19):
            x, y, z = MOVES[q]
            for k in range(size):
                p[q, k] = f[source[q, start + k]]
                still[k] += p[q, k]
                ux[k] += x * p[q, k]
                uy[k] += y * p[q, k]
                uz[k] += z * p[q, k]
        for k in range(size):
            still[k] -= 1.5 * (ux[k] ** 2 + uy[k] ** 2 + uz[k] ** 2)
            g[start + k] = p[0, k] - even * (p[0, k] - WEIGHTS[0] * still[k])
        for q in range(1, 19, 2):
            x, y, z = MOVES[q]
            weight = WEIGHTS[q]
            for k in range(size):
                along = x * ux[k] + y * uy[k] + z * uz[k]
                to_even = even * (0.5 * (p[q, k] + p[q + 1, k]) - weight * (still[k] + 4.5 * along * along))
                to_odd = odd * (0.5 * (p[q, k] - p[q + 1, k]) - weight * 3 * along)
                g[q * n + start + k] = p[q, k] - to_even - to_odd
                g[(q + 1) * n + start + k] = p[q + 1, k] - to_even + to_odd


relax = relax_arrays if njit is None else njit(fastmath=True)(relax_loops)


def solve(lattice: Lattice, tolerance: float, longest: int = 500) -> Flow:
    """March to the steady flow.

    Stops when the velocity, in the tube and in the sac each, changes by less than `tolerance` of its own norm
    per R / U; raises when `longest` of these have not been enough.
    """
    started = time.process_time()
    setting, points, links = lattice.setting, lattice.nodes.points, lattice.links
    n, per_unit = len(points), round(setting.nodes / setting.speed)
    rates = 1 / setting.tau_even, 1 / setting.tau_odd
    f, g = np.empty((2, 19 * n + len(links.first)))
    velocity = setting.speed * poiseuille(points)
    f[: 19 * n] = equilibrium(velocity).ravel()
    in_sac = sac_nodes(lattice)
    parts = [part for part in (in_sac, ~in_sac) if part.any()]
    change = np.inf
    for unit in range(1, longest + 1):
        for _ in range(per_unit):
            f[19 * n :] = arrivals(links, f, n)
            relax(f, g, lattice.source, *rates)
            f, g = g, f
        before, velocity = velocity, f[: 19 * n].reshape(19, n).T @ MOVES
        change = max(np.linalg.norm((velocity - before)[k]) / np.linalg.norm(velocity[k]) for k in parts)
        if change < tolerance:
            return Flow(lattice, velocity / setting.speed, unit * per_unit, time.process_time() - started)
        if not np.isfinite(change):
            break
    raise RuntimeError(f"no steady flow: the last change was {change}; take more nodes or a lower speed")


def equilibrium(velocity: Array) -> Array:
    """Populations (19, n) of a lattice velocity (n, 3) at density zero (the pressure at the outlet)."""
    along = velocity @ MOVES.T
    return (WEIGHTS * (3 * along + 4.5 * along**2 - 1.5 * (velocity**2).sum(1, keepdims=True))).T


def sac_nodes(lattice: Lattice) -> Array:
    """Which nodes lie in the sac, that is outside the tube."""
    return (lattice.nodes.points[:, 1:] ** 2).sum(1) > 1


def tube_error(flow: Flow) -> float:
    """Distance from Poiseuille over the whole tube, relative to Poiseuille's norm."""
    exact = poiseuille(flow.lattice.nodes.points)
    return float(np.linalg.norm(flow.velocity - exact) / np.linalg.norm(exact))


def flux(flow: Flow, x: Array) -> Array:
    """The flux in U R^2 through the lumen's sections at `x` in R; pi in a tube."""
    planes, plane = np.unique(flow.lattice.nodes.cells[:, 0], return_inverse=True)
    h = flow.lattice.setting.spacing
    through = np.bincount(plane, flow.velocity[:, 0]) * h**2
    return np.interp(x, flow.lattice.nodes.origin[0] + planes * h, through)


def describe_sac(flow: Flow) -> tuple[float, float]:
    """Mean speed in U over the sac, and the share of the sac where the flow runs against the tube's."""
    velocity = flow.velocity[sac_nodes(flow.lattice)]
    return float(np.linalg.norm(velocity, axis=1).mean()), float((velocity[:, 0] < 0).mean())


def interpolate(flow: Flow, points: Array) -> Array:
    """The velocity (n, 3) in U at points in R, trilinear; NaN where a corner of the cell is out of reach.

    Corners in the wall hold the velocity continued through it, so the wall's zero is where it belongs.
    """
    nodes, ghosts = flow.lattice.nodes, flow.lattice.ghosts
    total, count = np.zeros((*nodes.index.shape, 3)), np.zeros(nodes.index.shape)
    for cells, velocity in (
        (nodes.cells, flow.velocity),
        (ghosts.cells, ghosts.shares[:, None] * flow.velocity[ghosts.nodes]),
    ):
        np.add.at(total, tuple(cells.T), velocity)
        np.add.at(count, tuple(cells.T), 1)
    values = np.where(count[..., None] > 0, total / np.maximum(count, 1)[..., None], np.nan)

    place = (points - nodes.origin) / flow.lattice.setting.spacing
    cell = np.floor(place).astype(int)
    along = place - cell
    result = np.zeros_like(points)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(np.array(corner) == 1, along, 1 - along).prod(1)
        result += weight[:, None] * values[tuple((cell + corner).T)]
    return result


def draw_samples(flow: Flow, vessel: Vessel, count: int, seed: int) -> tuple[Array, Array]:
    """Points drawn uniformly in the lumen, half a spacing or more from the wall, and their velocities."""
    low, high = vessel.box()
    low[0], high[0] = -SAMPLE_HALF_LENGTH, SAMPLE_HALF_LENGTH
    points = np.random.default_rng(seed).uniform(low, high, (count * 20, 3))
    points = points[vessel.depth(points) >= 0.5 * flow.lattice.setting.spacing]
    velocity = interpolate(flow, points)
    known = np.isfinite(velocity).all(1)
    if known.sum() < count:
        raise RuntimeError(f"{known.sum()} of {count} points have all corners; take more nodes")
    return points[known][:count].astype(np.float32), velocity[known][:count].astype(np.float32)


def describe_flux(through: Array) -> str:
    """The range of the flux over the sections, in units of the exact one."""
    return f"{through.min() / np.pi:.4f} to {through.max() / np.pi:.4f}"


def main() -> None:
    """Solve at every resolution, print what came out, and keep the finest on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[10], help="lattice nodes per tube radius")
    parser.add_argument("--halfway", action="store_true", help="walls half-way between nodes: a staircase")
    parser.add_argument("--reynolds", type=float, default=32.0, help="U R / nu")
    parser.add_argument("--speed", type=float, default=0.1, help="U in lattice units")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative change per R / U at the end")
    parser.add_argument("--samples", type=int, default=4000, help="points to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--out", help="an .npz for the finest flow; nothing is written when left out")
    given = parser.parse_args()
    if njit is None:
        print("numba is not installed: numpy alone takes two to three times as long")

    tube, aneurysm = Vessel(), Vessel(sac_radius=1.3)
    where = np.arange(-7, 8) * 0.5
    for nodes in sorted(given.nodes):
        setting = Setting(nodes, given.reynolds, given.speed, given.halfway)
        straight, flow = (solve(build_lattice(v, setting), given.tolerance) for v in (tube, aneurysm))
        error, (mean_speed, backflow), through = tube_error(straight), describe_sac(flow), flux(flow, where)
        for name, shown, figures in (
            ("tube", straight, f"error {error:.2%}"),
            ("sac", flow, f"mean speed {mean_speed:.5f} U, backflow {backflow:.4f}"),
        ):
            print(
                f"{nodes} nodes per R, {name}: {figures}, flux / pi {describe_flux(flux(shown, where))}; "
                f"{len(shown.velocity)} nodes, {shown.steps} steps, CPU {shown.seconds:.0f} s",
                flush=True,
            )
    if given.out:
        points, velocity = draw_samples(flow, aneurysm, given.samples, given.seed)
        np.savez_compressed(
            given.out,
            points=points,
            velocity=velocity,
            sac_mean_speed=mean_speed,
            sac_backflow_fraction=backflow,
            flux_x=where,
            flux=through,
            tube_error=error,
            nodes=nodes,
        )


if __name__ == "__main__":
    main()
