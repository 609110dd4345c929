"""The dense aneurysm heat map: a Gaussian around the centre of every known aneurysm.

Points are enough to learn it from; where the positions of a scan's aneurysms are unknown nothing is learned.
"""

import numpy as np

from aneurysm.stages.stored import AnyCase

HEATMAP = "heatmap"  # name of the channel
KINDS = ("none", "gaussian")


def heatmap_patch(case: AnyCase, start: np.ndarray, size: int, sigma_mm: float) -> np.ndarray | None:
    """A cube of the target, (size, size, size) float32 in 0..1, 1 at a centre; None where it is unknown.

    Args:
        start: first voxel (d, h, w), may lie outside the scan.
        size: voxels per side.
        sigma_mm: of the Gaussians.
    """
    centres = [np.asarray(lesion.centre_mm, float) for lesion in case.lesions]
    if not centres and case.present is not False:
        return None
    target = np.zeros((size, size, size), np.float32)
    spacing = case.grid.spacing
    steps = [np.arange(size) * s for s in spacing]
    for centre in centres:
        # The grid's axes are at right angles: a Gaussian is a product of three.
        at = (case.grid.to_index(centre) - start) * spacing
        parts = [np.exp(-0.5 * ((step - a) / sigma_mm) ** 2) for step, a in zip(steps, at, strict=True)]
        bell = parts[0][:, None, None] * parts[1][None, :, None] * parts[2][None, None, :]
        np.maximum(target, bell.astype(np.float32), out=target)
    return target
