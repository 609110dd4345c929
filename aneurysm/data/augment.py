"""Random changes of a training patch that can be replayed: a plan is drawn first, then carried out.

Flips and small rotations move the grid along, so that `PreparedCase.grid` of an augmented patch still maps
every voxel to where it was in the patient. Intensity changes are MONAI's where it has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.transforms.intensity.array import (
    AdjustContrast,
    GaussianSmooth,
    GibbsNoise,
    RandBiasField,
    RandGaussianNoise,
)
from monai.transforms.spatial.array import RandSimulateLowResolution
from scipy.ndimage import affine_transform
from torch import Tensor

from aneurysm.data.labels import MIRRORED_LOCATION, mirrored_vessel_labels
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid


@dataclass(frozen=True)
class Plan:
    """What will be done to one patch; equal plans give equal patches."""

    mirror: bool  # left-right; labels must be swapped
    flip_up: bool  # superior-inferior
    flip_front: bool  # anterior-posterior
    degrees: tuple[float, float, float]  # about the axes d, h, w
    zoom: float  # 1.1 shows structures 10 % larger
    gamma: float | None
    brightness: float  # added, in normalised units
    contrast: float  # factor about the mean
    blur: float | None  # voxels, sigma
    low_resolution: float | None  # factor down and up again, below 1
    bias: float | None  # strength of the MR coil shading
    noise: float | None  # standard deviation, in normalised units
    seed: int  # of noise, bias and spikes
    ringing: float | None = None  # share of the high frequencies of an MR image that are lost (Gibbs ringing)
    ghost: tuple[int, int, float] | None = None  # MR motion: axis, number of ghosts, their strength
    spike: float | None = None  # strength of a wrong sample of k-space, an MR herringbone

    @property
    def moves(self) -> bool:
        """Whether voxels are interpolated."""
        return any(self.degrees) or self.zoom != 1

    def matrix(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Homogeneous (4, 4) map of an index in the augmented patch to the index in the original."""
        linear = np.eye(3)
        for axis, degrees in enumerate(self.degrees):
            a, b = [i for i in range(3) if i != axis]
            turn = np.eye(3)
            turn[a, a] = turn[b, b] = np.cos(np.radians(degrees))
            turn[a, b] = -np.sin(np.radians(degrees))
            turn[b, a] = -turn[a, b]
            linear = linear @ turn
        linear = (
            linear
            / self.zoom
            @ np.diag([-1.0 if flip else 1.0 for flip in (self.flip_up, self.flip_front, self.mirror)])
        )
        centre = (np.array(shape) - 1) / 2
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = linear, centre - linear @ centre
        return matrix


@dataclass(frozen=True)
class Augmentation:
    """How strongly and how often patches are changed; `*_chance` are probabilities per patch."""

    mirror_chance: float = 0.5
    flip_chance: float = 0.0  # superior-inferior and anterior-posterior: not anatomical, for pretraining
    affine_chance: float = 0.2
    degrees: float = 12.0  # largest rotation about each axis
    zoom: float = 0.1  # largest relative change of size
    gamma_chance: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    intensity_chance: float = 0.3
    brightness: float = 0.15  # largest shift, normalised units
    contrast: float = 0.25  # largest relative change
    blur_chance: float = 0.15
    blur: tuple[float, float] = (0.4, 1.0)  # voxels
    low_resolution_chance: float = 0.15
    low_resolution: tuple[float, float] = (0.5, 0.9)
    bias_chance: float = 0.2  # MR only
    bias: float = 0.3
    noise_chance: float = 0.3
    noise: float = 0.1  # largest standard deviation, normalised units
    # MR only, and off unless asked for: what pulsation, motion and faulty receivers leave in an image.
    ghost_chance: float = 0.0
    ghosts: tuple[int, int] = (2, 5)  # copies of the head along the phase direction
    ghost: float = 0.25  # largest share of their lines that is lost
    ringing_chance: float = 0.0
    ringing: float = 0.4  # largest share of frequencies that is cut off
    spike_chance: float = 0.0
    spike: float = 0.3  # largest amplitude, in standard deviations of the patch

    def __post_init__(self) -> None:
        for name in ("gamma", "blur", "low_resolution"):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (float(low), float(high)))
        object.__setattr__(self, "ghosts", (int(self.ghosts[0]), int(self.ghosts[1])))
        if not 2 <= self.ghosts[0] <= self.ghosts[1] or not 0 <= self.ghost < 1 or not 0 <= self.ringing < 1:
            raise ValueError("ghosts are at least 2, and the shares ghost and ringing lie in 0 to 1.")

    def draw(self, rng: np.random.Generator, modality: str | None = None) -> Plan:
        """Draw a plan; the number of draws does not depend on the outcome, so plans stay comparable."""
        chance = rng.random(9)
        size = rng.uniform(-1, 1, 4)
        level = rng.random(8)
        seed = int(rng.integers(2**31))
        # From a generator of its own, so that plans of the other changes are what they were without these.
        scanner = np.random.default_rng([seed, 1])
        odd, strength = scanner.random(3), scanner.random(3)
        ghosts = int(scanner.integers(self.ghosts[0], self.ghosts[1] + 1))
        axis = int(scanner.integers(3))
        magnetic = modality != "CTA"

        def between(limits: tuple[float, float], i: int) -> float:
            return float(limits[0] + (limits[1] - limits[0]) * level[i])

        coarse = chance[7] < self.low_resolution_chance
        low_resolution = between(self.low_resolution, 4) if coarse else None
        affine = chance[3] < self.affine_chance
        shifted = chance[5] < self.intensity_chance
        d, h, w = (float(v) * self.degrees if affine else 0.0 for v in size[:3])
        return Plan(
            mirror=bool(chance[0] < self.mirror_chance),
            flip_up=bool(chance[1] < self.flip_chance),
            flip_front=bool(chance[2] < self.flip_chance),
            degrees=(d, h, w),
            zoom=1 + float(size[3]) * self.zoom if affine else 1.0,
            gamma=between(self.gamma, 0) if chance[4] < self.gamma_chance else None,
            brightness=(2 * float(level[1]) - 1) * self.brightness if shifted else 0.0,
            contrast=1 + (2 * float(level[2]) - 1) * self.contrast if shifted else 1.0,
            blur=between(self.blur, 3) if chance[6] < self.blur_chance else None,
            low_resolution=low_resolution,
            bias=float(level[5]) * self.bias if level[6] < self.bias_chance and modality != "CTA" else None,
            noise=float(level[7]) * self.noise if chance[8] < self.noise_chance else None,
            seed=seed,
            ghost=(axis, ghosts, float(strength[0]) * self.ghost)
            if magnetic and odd[0] < self.ghost_chance
            else None,
            ringing=float(strength[1]) * self.ringing if magnetic and odd[1] < self.ringing_chance else None,
            spike=float(strength[2]) * self.spike if magnetic and odd[2] < self.spike_chance else None,
        )


def augment_patch(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    rng: np.random.Generator,
    augmentation: Augmentation,
    modality: str | None = None,
) -> tuple[np.ndarray, list[np.ndarray], Plan]:
    """Change an image patch and its masks alike.

    Masks are only moved: when the returned plan says `mirror`, the caller swaps left and right labels
    (`mirrored_vessel_labels`, `MIRRORED_LOCATION`); `augment_case` does so.

    Args:
        image: (d, h, w) float32, normalised.
        masks: each (d, h, w), integer.
        rng: the only source of randomness; the same state gives the same patch.
    """
    plan = augmentation.draw(rng, modality)
    return change_intensity(move(image, plan, order=1), plan), [move(m, plan, order=0) for m in masks], plan


def augment_case(
    case: PreparedCase, rng: np.random.Generator, augmentation: Augmentation
) -> tuple[PreparedCase, Plan]:
    """Change a patch with all its labels; a mirrored patch has left and right swapped everywhere.

    The grid moves along: `grid.to_index(lesion.centre_mm)` finds a lesion in the changed patch.
    """
    plan = augmentation.draw(rng, case.modality)
    image = change_intensity(move(case.image, plan, order=1, fill=case.background), plan)
    vessel = None if case.vessel is None else move(case.vessel, plan, order=0)
    aneurysm = None if case.aneurysm is None else move(case.aneurysm, plan, order=0)
    lesions, locations = case.lesions, case.locations
    if plan.mirror:
        vessel = None if vessel is None else mirrored_vessel_labels(vessel)
        locations = locations[list(MIRRORED_LOCATION)]
        lesions = tuple(
            lesion if lesion.location is None
            else replace(lesion, location=MIRRORED_LOCATION[lesion.location])
            for lesion in lesions
        )  # fmt: skip
    grid = Grid(case.grid.shape, case.grid.affine @ plan.matrix(case.grid.shape))
    changed = replace(
        case, image=image, vessel=vessel, aneurysm=aneurysm, lesions=lesions, locations=locations, grid=grid
    )
    return changed, plan


def move(volume: np.ndarray, plan: Plan, order: int, fill: float | None = None) -> np.ndarray:
    """Flip, rotate and zoom (d, h, w) about its centre; same shape.

    Args:
        order: 0 for masks, 1 for images.
        fill: value from outside the patch; None repeats the edge (images) or gives 0 (masks).
    """
    if not plan.moves:
        axes = [i for i, flip in enumerate((plan.flip_up, plan.flip_front, plan.mirror)) if flip]
        return np.ascontiguousarray(np.flip(volume, tuple(axes)))
    matrix = plan.matrix((volume.shape[0], volume.shape[1], volume.shape[2]))
    mode = "nearest" if order and fill is None else "constant"
    return affine_transform(volume, matrix, order=order, mode=mode, cval=fill or 0, prefilter=False)


def change_intensity(image: np.ndarray, plan: Plan) -> np.ndarray:
    """Apply the intensity part of a plan to (d, h, w) float32."""
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]  # channel first for MONAI
    if plan.bias is not None:
        # The coil multiplies the signal, which is positive; normalised values are not.
        floor = x.min()
        shading = RandBiasField(degree=2, coeff_range=(0.0, plan.bias), prob=1.0)
        shading.set_random_state(plan.seed)
        shaded = torch.as_tensor(shading(x - floor))
        # Shading has a mean far from 1; the normalisation of a scan would have taken that out.
        x = shaded * ((x - floor).mean() / shaded.mean().clamp_min(1e-6)) + floor
    if plan.blur is not None:
        x = GaussianSmooth(plan.blur)(x)
    if plan.low_resolution is not None:
        zoom = (plan.low_resolution, plan.low_resolution)
        x = RandSimulateLowResolution(prob=1.0, zoom_range=zoom)(x)
    if plan.ghost is not None:
        x = ghosted(x, *plan.ghost)
    if plan.ringing is not None:
        x = torch.as_tensor(GibbsNoise(alpha=plan.ringing)(x))
    if plan.spike is not None:
        x = _spiked(x, plan.spike, plan.seed)
    if plan.gamma is not None:
        x = AdjustContrast(plan.gamma)(x)
    if plan.contrast != 1 or plan.brightness:
        mean = x.mean()
        x = (x - mean) * plan.contrast + mean + plan.brightness
    if plan.noise is not None:
        noise = RandGaussianNoise(prob=1.0, std=plan.noise, sample_std=False)
        noise.set_random_state(plan.seed)
        x = noise(x)
    return np.asarray(torch.as_tensor(x)[0], dtype=np.float32)


def ghosted(image: Tensor, axis: int, ghosts: int, strength: float) -> Tensor:
    """Copies of a moving head along the phase direction of an MR scan.

    Every `ghosts`-th line of k-space was taken in another state of motion, here with less signal; the image
    repeats faintly at distances of 1 / `ghosts` of the field of view. MONAI has no such transform.

    Args:
        image: (1, d, h, w).
        axis: of the phase direction, 0, 1, 2 for d, h, w.
        strength: share of the signal that these lines lose, 0..1.
    """
    axis, n = axis + 1, image.shape[axis + 1]
    space = torch.fft.fft(image, dim=axis)
    # The mean and the coarsest shapes are kept: the whole patch would change its brightness otherwise.
    frequency = torch.fft.fftfreq(n, d=1 / n).round().long().abs()
    lines = (frequency % ghosts == 0) & (frequency > 0)
    weight = torch.where(lines, 1 - strength, 1.0).to(image.dtype)
    shape = [1] * image.ndim
    shape[axis] = n
    return torch.fft.ifft(space * weight.reshape(shape), dim=axis).real.to(image.dtype)


def _spiked(image: Tensor, strength: float, seed: int) -> Tensor:
    """A plane wave of `strength` standard deviations: one sample of k-space was wrong."""
    rng = np.random.default_rng([seed, 2])
    frequency = rng.uniform(0.1, 0.4, 3) * rng.choice([-1, 1], 3)  # cycles per voxel, no whole-patch drift
    axes = [
        torch.arange(n, dtype=image.dtype) * float(f) for n, f in zip(image.shape[1:], frequency, strict=True)
    ]
    phase = axes[0][:, None, None] + axes[1][None, :, None] + axes[2] + float(rng.random())
    return image + strength * image.std() * torch.cos(2 * np.pi * phase)
