"""How much blood runs through each vessel of a small tree: Murray's law at its exits, Kirchhoff's inside.

The flow in a vessel that keeps its wall shear stress is proportional to the cube of its radius (Murray, PNAS
12, 1926). Blood enters by the widest exit and leaves by the others in that proportion. What runs where in
between follows from mass alone in a tree; around a loop, such as that of Willis, it divides by the
resistances of Poiseuille's law, length over radius to the fourth.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MURRAY = 3.0  # exponent of the radius


@dataclass(frozen=True, eq=False)
class VesselTree:
    """Vessels of a crop as straight pieces, and where they leave it; (d, h, w) mm from the crop's middle."""

    position: Float[np.ndarray, "n 3"]
    edges: Int[np.ndarray, "e 2"]
    edge_length: Float[np.ndarray, "e"]
    edge_radius: Float[np.ndarray, "e"]
    exit_node: Int[np.ndarray, "k"]  # the last node before the exit
    exit_position: Float[np.ndarray, "k 3"]
    exit_outward: Float[np.ndarray, "k 3"]  # unit
    exit_radius: Float[np.ndarray, "k"]


def murray_outflow(
    exit_radius: Float[np.ndarray, "k"], exponent: float = MURRAY, inlet: int | None = None
) -> Float[np.ndarray, "k"]:
    """Flow out of every exit: -1 at the inlet, shares of r^exponent that sum to 1 at the others.

    Args:
        exit_radius: at least 2, any unit.
        inlet: which exit blood comes in by; the widest when None.

    Raises:
        ValueError: fewer than two exits, or a radius that is not positive.
    """
    if len(exit_radius) < 2 or not np.all(exit_radius > 0):
        raise ValueError(f"Flow needs two exits or more of positive radius, got {exit_radius.tolist()}.")
    first = int(np.argmax(exit_radius)) if inlet is None else inlet
    share = exit_radius.astype(np.float64) ** exponent
    share[first] = 0
    share /= share.sum()
    share[first] = -1
    return share


def edge_flow(tree: VesselTree, outflow: Float[np.ndarray, "k"]) -> Float[np.ndarray, "e"]:
    """Flow through every edge, from its first to its second node, in the unit of `outflow`.

    Raises:
        ValueError: outflows that do not sum to 0 have no steady flow.
    """
    if abs(outflow.sum()) > 1e-6 * np.abs(outflow).max(initial=1e-12):
        raise ValueError(f"What flows in must flow out; {outflow.tolist()} sum to {outflow.sum():.3g}.")
    n, e = len(tree.position), len(tree.edges)
    if e == 0:
        return np.zeros(0)
    incidence = np.zeros((e, n))
    incidence[np.arange(e), tree.edges[:, 0]] = 1
    incidence[np.arange(e), tree.edges[:, 1]] = -1
    radius = np.maximum(tree.edge_radius, 1e-3)
    conductance = radius**4 / np.maximum(tree.edge_length, 1e-3)
    conductance /= conductance.max()
    source = np.zeros(n)
    np.add.at(source, tree.exit_node, -outflow)
    # The pressure level is free: least squares takes the solution with mean zero.
    laplacian = incidence.T @ (conductance[:, None] * incidence)
    pressure = np.linalg.lstsq(laplacian, source, rcond=1e-13)[0]
    return conductance * (incidence @ pressure)
