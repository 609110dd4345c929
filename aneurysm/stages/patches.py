"""Cubes cut from prepared cases, as the networks see them and as they should answer.

Every function gives what its whole-volume counterpart in `volumes` has at the same place, from a case in
memory or from one on disk, and pads what lies outside the scan.
"""

import numpy as np

from aneurysm.data.labels import UNNAMED_VESSEL, VESSEL_LABEL
from aneurysm.data.preparation.prepared import Index, StoredList, box_of
from aneurysm.stages.stored import AnyCase, Probabilities, StoredProbabilities
from aneurysm.stages.volumes import POINT_LESION_RADIUS_MM, ball_voxels


def network_volume(case: AnyCase) -> np.ndarray:
    """`network_image` of a case that may lie on disk."""
    image = case.box("image", (0, 0, 0), case.grid.shape)
    return -image if case.modality == "T2" else image


def network_patch(case: AnyCase, start: np.ndarray, size: int) -> np.ndarray:
    """A cube of `network_image`, (size, size, size); what lies outside the scan is its darkest value."""
    low, high = case.image_range
    if case.modality == "T2":
        return -case.box("image", _index(start), _cube(size), fill=high)
    return case.box("image", _index(start), _cube(size), fill=low)


def vessel_patch(case: AnyCase, start: np.ndarray, size: int) -> np.ndarray | None:
    """A cube of `vessel_target`."""
    if "vessel" not in case.masks:
        return None
    lumen = case.box("vessel", _index(start), _cube(size)) > 0
    if "aneurysm" in case.masks:
        lumen |= case.box("aneurysm", _index(start), _cube(size)) > 0
    return lumen


def vessel_volume(case: AnyCase) -> np.ndarray | None:
    """`vessel_target` of a case that may lie on disk."""
    if "vessel" not in case.masks:
        return None
    lumen = case.box("vessel", (0, 0, 0), case.grid.shape) > 0
    if "aneurysm" in case.masks:
        lumen |= case.box("aneurysm", (0, 0, 0), case.grid.shape) > 0
    return lumen


def artery_patch(case: AnyCase, start: np.ndarray, size: int) -> np.ndarray | None:
    """A cube of vessel labels, uint8; UNNAMED_VESSEL where the lumen of `vessel_patch` has no name.

    A sac that the vessel labels leave out has the name of its lesion's location.
    """
    if "vessel" not in case.masks:
        return None
    labels = case.box("vessel", _index(start), _cube(size))
    if "aneurysm" not in case.masks:
        return labels
    sac = case.box("aneurysm", _index(start), _cube(size))
    names = np.full(256, UNNAMED_VESSEL, np.uint8)
    names[0] = 0
    for k, lesion in enumerate(case.lesions, start=1):
        if lesion.location is not None and k < 256:
            names[k] = VESSEL_LABEL[lesion.location]
    return np.where(labels > 0, labels, names[sac])


def aneurysm_patch(case: AnyCase, start: np.ndarray, size: int) -> np.ndarray | None:
    """A cube of `aneurysm_target`."""
    if "aneurysm" in case.masks:
        return case.box("aneurysm", _index(start), _cube(size)) > 0
    if not case.lesions and case.present is not False:
        return None
    mask = np.zeros(_cube(size), bool)
    for lesion in case.lesions:
        radius = lesion.radius_mm or POINT_LESION_RADIUS_MM
        inside = ball_voxels(case.grid, lesion.centre_mm, radius) - start
        inside = inside[((inside >= 0) & (inside < size)).all(axis=1)]
        mask[tuple(inside.T)] = True
    return mask


def vessel_voxels(case: AnyCase) -> np.ndarray | StoredList | None:
    """Flat indices of the voxels of `vessel_target`, rising."""
    return case.lumen_voxels


def aneurysm_voxels(case: AnyCase) -> np.ndarray | StoredList | None:
    """Flat indices of the voxels of `aneurysm_target`, rising."""
    if "aneurysm" in case.masks:
        return case.sac_voxels
    if not case.lesions:
        return np.zeros(0, int) if case.present is False else None
    balls = [
        ball_voxels(case.grid, lesion.centre_mm, lesion.radius_mm or POINT_LESION_RADIUS_MM)
        for lesion in case.lesions
    ]
    return np.unique(np.ravel_multi_index(tuple(np.concatenate(balls).T), case.grid.shape))


def probability_patch(volumes: Probabilities, name: str, start: np.ndarray, size: int) -> np.ndarray:
    """A cube of a probability volume, 0 outside, (size, size, size) float32."""
    if isinstance(volumes, StoredProbabilities):
        return volumes.box(name, _index(start), _cube(size))
    return box_of(volumes[name], _index(start), _cube(size)).astype(np.float32)


def _index(values: np.ndarray) -> Index:
    d, h, w = (int(v) for v in values)
    return d, h, w


def _cube(size: int) -> Index:
    return size, size, size
