"""What geometry alone says of a node: the control arm without any trained graph net."""

import numpy as np
from scipy.special import expit

from aneurysm.vessels.graph import VesselGraph

# Of order one each: volume and depth of what no tube explains, fatness of a short branch, and width.
WEIGHTS = {"bulge_volume": 1.0, "bulge_depth": 1.0, "tip_fatness": 0.5, "inscribed_ratio": 0.5}
_EVEN = 4.0  # weighted sum at even odds, about the 99th percentile of healthy nodes


def geometric_score(graph: VesselGraph) -> np.ndarray:
    """A fixed score per node, (N,) float32 in 0..1.

    Raises:
        ValueError: the graph lacks one of the features.
    """
    missing = [name for name in WEIGHTS if name not in graph.node_names]
    if missing:
        raise ValueError(f"The graph lacks the node features {missing}; build it with this version.")
    total = sum(
        weight * graph.node_features[:, graph.node_names.index(name)] for name, weight in WEIGHTS.items()
    )
    return expit(np.asarray(total, float) - _EVEN).astype(np.float32)
