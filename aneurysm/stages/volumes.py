"""From a prepared case to what the networks see, and from their windows back to a whole volume."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from aneurysm.data.files import replacing
from aneurysm.data.prepared import PreparedCase, load_prepared
from aneurysm.data.scan import Grid

POINT_LESION_RADIUS_MM = 2.5  # sphere drawn where only a localizer point is known


@lru_cache(maxsize=64)
def remembered(path: Path) -> PreparedCase:
    """Load a prepared case, keeping the most recent ones in memory."""
    return load_prepared(path)


def network_image(case: PreparedCase) -> np.ndarray:
    """The image as the networks see it, (d, h, w) float32: vessels bright in every modality.

    On T2 flowing blood is a dark void, so T2 is negated; the networks then share one meaning of bright.
    """
    return -case.image if case.modality == "T2" else case.image


def vessel_target(case: PreparedCase) -> np.ndarray | None:
    """Lumen including sacs, (d, h, w) bool, or None where vessels are not annotated."""
    if case.vessel is None:
        return None
    return (case.vessel > 0) | (case.aneurysm > 0) if case.aneurysm is not None else case.vessel > 0


def aneurysm_target(case: PreparedCase) -> np.ndarray | None:
    """Sac mask, (d, h, w) bool, or None where it is unknown.

    A positive scan with points only gets small spheres; one without any position is unknown.
    """
    if case.aneurysm is not None:
        return case.aneurysm > 0
    if case.lesions:
        mask = np.zeros(case.grid.shape, bool)
        for lesion in case.lesions:
            radius = lesion.radius_mm or POINT_LESION_RADIUS_MM
            mask |= ball(case.grid, lesion.centre_mm, radius)
        return mask
    return np.zeros(case.grid.shape, bool) if case.present is False else None


def ball(grid: Grid, centre_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Voxels within `radius_mm` of a world position, (d, h, w) bool."""
    mask = np.zeros(grid.shape, bool)
    centre = grid.to_index(centre_mm)
    reach = np.ceil(radius_mm / grid.spacing).astype(int) + 1
    low = np.maximum(np.floor(centre).astype(int) - reach, 0)
    high = np.minimum(np.floor(centre).astype(int) + reach + 1, grid.shape)
    if (high <= low).any():
        return mask
    index = np.stack(
        np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1
    )
    inside = np.linalg.norm(grid.to_mm(index) - centre_mm, axis=-1) <= radius_mm
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
    return mask


def crop(
    volume: np.ndarray, start: np.ndarray, size: int | tuple[int, int, int], fill: float = 0.0
) -> np.ndarray:
    """A box of `size` voxels from index `start` (may be outside), padded with `fill`."""
    sizes = np.broadcast_to(np.asarray(size), 3)
    low, high = np.maximum(start, 0), np.minimum(start + sizes, volume.shape)
    out = np.full(tuple(sizes), fill, volume.dtype)
    if (high > low).all():
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        out[target] = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return out


@torch.no_grad()
def probability_volume(net: nn.Module, inputs: np.ndarray, window: int, overlap: float) -> np.ndarray:
    """Slide `net` over (c, d, h, w) float32 and return sigmoid probabilities (k, d, h, w) float32."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    logits: Tensor = sliding_window_inference(  # type: ignore[assignment]
        torch.from_numpy(np.ascontiguousarray(inputs))[None].to(device),
        roi_size=window,
        sw_batch_size=2,
        predictor=net,
        overlap=overlap,
        mode="gaussian",
        padding_mode="replicate",
    )
    net.train(was_training)
    return torch.sigmoid(logits[0]).float().cpu().numpy()


def write_probabilities(path: Path, volumes: dict[str, np.ndarray]) -> None:
    """Store probability volumes as uint8 (1/255 steps), atomically."""
    tensors = {k: np.ascontiguousarray(np.round(v * 255).astype(np.uint8)) for k, v in volumes.items()}
    with replacing(path) as part:
        save_file(tensors, part)


@lru_cache(maxsize=64)
def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """Read probability volumes back as float32 in 0..1."""
    return {name: v.astype(np.float32) / 255 for name, v in load_file(path).items()}
