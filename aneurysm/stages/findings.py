"""What the expert looks at: candidates with their surroundings, as crops with targets.

A finding joins a candidate of the Smart Net with the scan, the segmentation and the vessel graph around it;
an example is the crop that the network gets.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from aneurysm.data.augment import Augmentation, change_intensity
from aneurysm.data.labels import MIRRORED_LOCATION, MODALITIES
from aneurysm.data.scan import Grid
from aneurysm.nets.expert import ExpertBatch
from aneurysm.physics.flow_points import FlowPoints, collate_flow
from aneurysm.physics.flow_sampling import sample_flow_points
from aneurysm.physics.network_flow import VesselTree
from aneurysm.stages.patches import aneurysm_patch, network_patch, probability_patch
from aneurysm.stages.stored import AnyCase, Probabilities
from aneurysm.vessels.candidates import Candidate, candidate_graph_features
from aneurysm.vessels.exits import local_tree
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.parent import local_path, parent_node

# Only the intensity part of a plan is used; crops are flipped and shifted here, with their targets.
INTENSITY = Augmentation()
FLOW_REACH = 4.0  # parent radii: of what is further off the flow at the candidate knows nothing
SIGNS = {0: 2, 1: 1, 2: 0}  # array axis (d, h, w) -> world axis (z, y, x)


@dataclass(frozen=True, eq=False)
class Finding:
    """A candidate with its surroundings and, in training, with what is known about it."""

    case: AnyCase
    probability: Probabilities  # lumen and sac, (d, h, w) float16 or float32
    graph: VesselGraph
    number: int  # of the candidate in its scan, -1 for an annotation
    candidate: Candidate
    threshold: float  # at which the vessel probability counts as lumen
    is_aneurysm: float = np.nan  # 1, 0, NaN unknown
    location: int = -1  # index into LOCATIONS, -1 unknown
    lesion_mm: np.ndarray | None = None  # centre of the aneurysm that was hit
    flow_of: "Finding | None" = None  # whose vessel the physics head gets to see; its own when None

    @property
    def centre_mm(self) -> np.ndarray:
        """(3,) RAS."""
        return self.candidate.centre_mm

    @cached_property
    def graph_features(self) -> np.ndarray:
        """What the graph says about the place, (f,) float32."""
        return candidate_graph_features(self.graph, self.candidate)

    @cached_property
    def position(self) -> np.ndarray:
        """(x, y, z) from the centre of the vessel tree, in units of 50 mm."""
        if not len(self.graph.position):
            return np.full(3, np.nan, np.float32)
        return ((self.centre_mm - np.median(self.graph.position, axis=0)) / 50).astype(np.float32)


@dataclass(frozen=True)
class CropSettings:
    """How a candidate becomes the network's input."""

    crop: int  # voxels per side
    flow: bool  # sample collocation points for the physics head
    graph: bool = True  # show what the vessel graph says about the place; without, it is unknown


def list_findings(
    case: AnyCase,
    probability: Probabilities,
    graph: VesselGraph,
    rows: pd.DataFrame,
    threshold: float,
    hit_mm: float = 5.0,
    add_annotations: bool = False,
) -> list[Finding]:
    """The candidates of one scan, labelled as far as its aneurysms are known.

    Args:
        rows: of the candidates table.
        threshold: of the vessel probability.
        hit_mm: a candidate this close to an aneurysm's centre, or inside its radius, is one.
        add_annotations: also add every annotated aneurysm as a finding of its own (training only), so that
            what the Smart Net missed is still learned from.
    """
    known = bool(case.lesions) or case.present is False
    made = []
    for row in rows.to_dict("records"):
        centre = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
        place = Candidate(centre, float(row["score"]), int(row["node"]), float(row["radius_mm"]))
        one = Finding(case, probability, graph, int(row["candidate"]), place, threshold)
        made.append(_label(one, hit_mm) if known else one)
    if add_annotations and case.lesions:
        for lesion in case.lesions:
            centre = np.asarray(lesion.centre_mm)
            place = annotated_place(graph, centre, annotated_score(rows, centre, hit_mm))
            one = Finding(case, probability, graph, -1, place, threshold)
            made.append(_label(one, hit_mm))
    return made


def annotated_score(rows: pd.DataFrame, centre_mm: np.ndarray, hit_mm: float) -> float:
    """What the Smart Net thought of an annotated aneurysm: score of the candidate on it, else the lowest.

    Anything higher would teach the expert that aneurysms are what scores high.
    """
    if not len(rows):
        return 0.5
    gap = np.linalg.norm(rows[["x_mm", "y_mm", "z_mm"]].to_numpy(float) - centre_mm, axis=1)
    nearest = int(gap.argmin())
    return float(rows.score.iloc[nearest] if gap[nearest] <= hit_mm else rows.score.min())


def annotated_place(graph: VesselGraph, centre_mm: np.ndarray, score: float) -> Candidate:
    """An annotated aneurysm as if the Smart Net had proposed it."""
    if not len(graph):
        return Candidate(centre_mm, score, -1, 0.0)
    node = int(np.linalg.norm(graph.position - centre_mm, axis=1).argmin())
    return Candidate(centre_mm, score, node, float(graph.radius[node]))


def _label(one: Finding, hit_mm: float) -> Finding:
    best, reach = None, np.inf
    for lesion in one.case.lesions:
        distance = float(np.linalg.norm(lesion.centre_mm - one.centre_mm))
        if distance <= max(hit_mm, lesion.radius_mm or 0.0) and distance < reach:
            best, reach = lesion, distance
    if best is None:
        return replace(one, is_aneurysm=0.0)
    location = -1 if best.location is None else best.location
    return replace(one, is_aneurysm=1.0, location=location, lesion_mm=np.asarray(best.centre_mm))


@dataclass(frozen=True, eq=False)
class Target:
    """What the expert should say about a batch of candidates."""

    is_aneurysm: Tensor  # (b,) 0, 1, NaN
    location: Tensor  # (b,) long, -1 unknown
    offset_mm: Tensor  # (b, 3), NaN where there is no aneurysm
    mask: Tensor  # (b, 1, d, h, w)
    mask_known: Tensor  # (b, 1) bool


def example(
    one: Finding,
    settings: CropSettings,
    shift_mm: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[ExpertBatch, Target]:
    """A batch of one: the crop around a candidate and its targets.

    Args:
        shift_mm: moves the crop, (x, y, z).
        rng: augments when given: flips, and intensity changes.
    """
    case, grid, size = one.case, one.case.grid, settings.crop
    middle = one.centre_mm + (shift_mm if shift_mm is not None else 0.0)
    start = np.round(grid.to_index(middle)).astype(int) - size // 2
    middle = grid.to_mm(start + (size - 1) / 2)  # the centre of the voxels that are actually cut out
    patch = network_patch(case, start, size)
    vessel = probability_patch(one.probability, "vessel", start, size)
    sac = aneurysm_patch(case, start, size)
    mask = sac if sac is not None else np.zeros(patch.shape, bool)
    offset = np.full(3, np.nan) if one.lesion_mm is None else one.lesion_mm - middle
    location, position = one.location, one.position.copy()
    flow = flow_points(one, size) if settings.flow else None
    if rng is not None:
        patch = change_intensity(patch, INTENSITY.draw(rng, case.modality))
        for axis in range(3):
            if rng.random() < 0.5:
                world = SIGNS[axis]
                patch, vessel, mask = (np.flip(a, axis) for a in (patch, vessel, mask))
                offset[world] *= -1
                # Only left and right are interchangeable: after any other flip the place has no name.
                position[world] *= -1
                if world == 0 and location >= 0:
                    location = MIRRORED_LOCATION[location]
                elif world != 0:
                    location = -1
    slot = MODALITIES.index(case.modality)
    images = np.zeros((1, len(MODALITIES), *patch.shape), np.float32)
    images[0, slot] = patch
    present = torch.zeros(1, len(MODALITIES), dtype=torch.bool)
    present[0, slot] = True
    sex = {"M": 0.0, "F": 1.0}.get(case.sex or "", np.nan)
    inputs = ExpertBatch(
        image=torch.from_numpy(images),
        present=present,
        vessel=_tensor(vessel)[None, None],
        age=torch.tensor([np.nan if case.age is None else case.age], dtype=torch.float32),
        sex=torch.tensor([sex], dtype=torch.float32),
        position=_tensor(position)[None],
        graph=_tensor(one.graph_features if settings.graph else np.full_like(one.graph_features, np.nan))[
            None
        ],
        score=torch.tensor([one.candidate.score], dtype=torch.float32),
        flow=flow,
    )
    target = Target(
        is_aneurysm=torch.tensor([one.is_aneurysm], dtype=torch.float32),
        location=torch.tensor([location]),
        offset_mm=_tensor(offset)[None],
        mask=_tensor(mask)[None, None],
        mask_known=torch.tensor([[sac is not None]]),
    )
    return inputs, target


def with_foreign_flow(found: Sequence[Finding], seed: int) -> list[Finding]:
    """The same candidates, each with another one's vessel for the physics head: a placebo.

    The vessel comes from another scan where there is one. The choice depends on the seed, the candidate and
    the list.
    """
    given = []
    for i, one in enumerate(found):
        others = [f for f in found if f.case.series_uid != one.case.series_uid]
        others = others or [f for j, f in enumerate(found) if j != i]
        rng = np.random.default_rng([seed, zlib.crc32(one.case.series_uid.encode()), one.number + 1])
        given.append(replace(one, flow_of=others[int(rng.integers(len(others)))] if others else None))
    return given


def remember(one: Finding, settings: CropSettings) -> None:
    """Work out what every crop of a finding shares, and keep it with the finding."""
    _ = one.graph_features, one.position
    if settings.flow:
        flow_points(one, settings.crop)


def flow_points(one: Finding, size: int) -> FlowPoints:
    """Collocation points of the lumen around a candidate, in the frame of its own vessel.

    They are drawn once per candidate and seeded by it, so every epoch and every model sees the same ones.
    """
    if one.flow_of is not None:
        return flow_points(one.flow_of, size)
    cached = one.__dict__.get("_flow_points")
    if cached is None:
        uid = one.case.series_uid
        rng = np.random.default_rng([zlib.crc32(uid.encode()), one.number + 1])
        cached = candidate_flow(
            one.probability, one.case.grid, one.graph, one.candidate, one.threshold, size, rng=rng
        )
        key = zlib.crc32(f"{uid} {one.number} {one.centre_mm.round(2).tolist()}".encode())
        cached = replace(cached, key=torch.tensor([key + 1]))
        one.__dict__["_flow_points"] = cached
    return cached


def candidate_flow(
    probability: Probabilities,
    grid: Grid,
    graph: VesselGraph,
    candidate: Candidate,
    threshold: float,
    size: int,
    points: int = 256,
    caps: bool = True,
    *,
    rng: np.random.Generator,
) -> FlowPoints:
    """Places in the blood around any candidate of a vessel graph.

    Args:
        probability: of the vessel, on the grid; `threshold` and more is lumen.
        graph: of that lumen.
        size: voxels per side of the crop around the candidate.
        points: collocation points.
        caps: prescribe the flow where vessels leave; otherwise nothing but its amount.
    """
    start = np.round(grid.to_index(candidate.centre_mm)).astype(int) - size // 2
    middle = start + (size - 1) / 2
    reach = min(0.5 * size * float(grid.spacing.min()), flow_reach(graph, candidate))
    path, tangent, radius = local_path(graph, candidate, extent_mm=reach)
    path = (grid.to_index(candidate.centre_mm + path) - middle) * grid.spacing  # (m, 3) as (d, h, w) mm
    tangent = tangent @ (grid.affine[:3, :3] / grid.spacing)
    nodes = (grid.to_index(graph.position) - middle) * grid.spacing
    box = np.minimum(0.5 * size * grid.spacing, reach)
    tree = VesselTree(**vars(local_tree(graph, candidate, nodes, half_mm=box))) if caps else None
    vessel = above_half(probability_patch(probability, "vessel", start, size), threshold)
    return sample_flow_points(vessel, grid.spacing, path, tangent, radius, points, tree=tree, rng=rng)


def flow_reach(graph: VesselGraph, candidate: Candidate) -> float:
    """How far from a candidate its flow is of interest, in mm: some vessel radii on both sides of the sac."""
    node = parent_node(graph, candidate)
    parent = float(graph.radius[node]) if node >= 0 else 0.0
    return FLOW_REACH * parent + 2 * candidate.radius_mm


def above_half(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Stretch probabilities so that the recall-first threshold comes to lie at one half."""
    low = 0.5 * probability / threshold
    high = 0.5 + 0.5 * (probability - threshold) / max(1 - threshold, 1e-6)
    return np.where(probability < threshold, low, high).astype(np.float32)


def collate(items: list[tuple[ExpertBatch, Target]]) -> tuple[ExpertBatch, Target]:
    """Join batches of one."""
    inputs = [i for i, _ in items]
    names = ("image", "present", "vessel", "age", "sex", "position", "graph", "score")
    joined = {name: torch.cat([getattr(i, name) for i in inputs]) for name in names}
    flow = None if inputs[0].flow is None else collate_flow([i.flow for i in inputs])  # type: ignore[misc]
    targets = [t for _, t in items]
    target = Target(**{name: torch.cat([getattr(t, name) for t in targets]) for name in vars(targets[0])})
    return ExpertBatch(**joined, flow=flow), target


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
