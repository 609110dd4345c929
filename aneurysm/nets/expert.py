"""The expert: looks at one candidate's crop and says whether, where, which voxels and how sure.

Path: fusion of the modalities -> backbone stages, with oscillators in some of them -> metadata gate on the
deepest map -> light decoder to a mask -> features pooled around the candidate, evidence read off the mask ->
heads. The candidate sits at the centre of the crop. Whether it is an aneurysm is a correction to the score of
the stage that proposed it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.data.labels import LOCATIONS
from aneurysm.global_batch import rows_in_all, total
from aneurysm.nets.fusion import SLOTS
from aneurysm.nets.metadata import LearnedMissing, encode_metadata
from aneurysm.nets.oscillators import OscillatorState
from aneurysm.nets.shapes import expect_map, expect_rows
from aneurysm.nets.waveformer import Encoding

MAX_OFFSET_MM = 10.0
EVIDENCE = 3  # numbers of `mask_evidence`
SAC_SHARE = 0.002  # of the voxels of all crops, about


@runtime_checkable
class Movable(Protocol):
    """Something that follows a batch to a device, such as the collocation points of the flow."""

    def to(self, device: torch.device | str) -> "Movable": ...


@runtime_checkable
class FlowReading(Protocol):
    """What a physics head says about a batch of candidates."""

    total: Tensor  # scalar with gradient: sum over valid rows of log(1 + loss)
    loss: Tensor  # (b,) detached
    residual_log10: Tensor  # (b,)
    features: Tensor  # (b, feature_count)
    valid: Tensor  # (b,) bool
    driven: Tensor  # (b,) bool: by what flows in and out, see `physics.caps`


@runtime_checkable
class Encoder(Protocol):
    """What the expert needs of a backbone; `WaveFormerEncoder` is one."""

    widths: Sequence[int]  # channels per stage, fine to coarse
    strides: Sequence[int]  # voxels per cell per stage, the first that of the fusion
    patch_embed: nn.Module  # Conv3d(1, widths[0], 2, 2), the pretrained stem

    def encode(self, embedded: Tensor) -> Encoding: ...

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None: ...

    def pretrained_parameters(self) -> Sequence[nn.Parameter]: ...


@dataclass(frozen=True, eq=False)
class ExpertBatch:
    """Candidates with everything known about them."""

    image: Float[Tensor, "b 4 d h w"]  # normalised intensity per slot; absent slots are never read
    present: Bool[Tensor, "b 4"]
    vessel: Float[Tensor, "b 1 d h w"]  # probability
    age: Float[Tensor, "b"]  # years, NaN unknown
    sex: Float[Tensor, "b"]  # 0 male, 1 female, NaN unknown
    position: Float[Tensor, "b 3"]  # (x, y, z) mm / 50 from the centre of the vessel tree, NaN unknown
    graph: Float[Tensor, "b f"]  # standardised node features of the candidate, NaN unknown
    score: Float[Tensor, "b"]  # 0..1, of the stage that proposed the candidate, NaN unknown
    flow: Movable | None = None  # FlowPoints of the batch

    def to(self, device: torch.device | str) -> "ExpertBatch":
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in values.items() if v is not None})


@dataclass(frozen=True, eq=False)
class ExpertOutput:
    """What the expert says about every candidate."""

    logit: Float[Tensor, "b"]  # of being an aneurysm
    location_logits: Float[Tensor, "b 13"]  # labels.LOCATIONS
    mask_logit: Float[Tensor, "b 1 d h w"]  # of the aneurysm's voxels, on the grid of the crop
    offset_mm: Float[Tensor, "b 3"]  # (x, y, z) from the crop's centre to the aneurysm's, each within 10 mm
    order_parameter: Float[Tensor, "b"]  # synchrony of the last oscillators, [0, 1]; NaN without any
    oscillators: list[OscillatorState]  # of the stages that have them, finest first
    physics: FlowReading | None
    embedding: Float[Tensor, "b e"]  # image features before the heads


def _voxels_from_centre(cells: int, voxels: int, like: Tensor) -> Float[Tensor, "cells"]:
    """Distance of every cell's middle from the crop's centre along one axis, in voxels of the crop."""
    middle = (torch.arange(cells, device=like.device, dtype=torch.float32) + 0.5) / cells
    return (middle - 0.5) * voxels


def log_odds(score: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Of a score in 0..1, within +-4.6 (1 % and 99 %); 0 where unknown."""
    return torch.logit(torch.nan_to_num(score, nan=0.5).clamp(0.01, 0.99))


def centre_pool(
    features: Float[Tensor, "b c d h w"], crop: Sequence[int], sigma: float
) -> Float[Tensor, "b c"]:
    """Average under a Gaussian window (sigma in voxels of the crop) at the crop's centre."""
    pooled = features
    for size in reversed(list(crop)):  # one axis after the other, last first
        distance = _voxels_from_centre(pooled.shape[-1], size, pooled)
        weight = torch.softmax(-(distance**2) / (2 * sigma**2), dim=0)
        pooled = (pooled * weight.to(pooled.dtype)).sum(-1)
    return pooled


def expected_place(score: Float[Tensor, "b 1 d h w"], crop: Sequence[int]) -> Float[Tensor, "b 3"]:
    """Mean (x, y, z) under a softmax over the map, in voxels of the crop from its centre."""
    weight = score.float().flatten(1).softmax(1).view(score.shape[0], *score.shape[2:])
    along = []
    for axis in (3, 2, 1):  # w, h, d are x, y, z
        others = tuple(a for a in (1, 2, 3) if a != axis)
        distance = _voxels_from_centre(weight.shape[axis], crop[axis - 1], weight)
        along.append((weight.sum(others) * distance).sum(1))
    return torch.stack(along, dim=1)


class MaskDecoder(nn.Module):
    """From the coarsest stage up: enlarge, add the projected skip, convolve; at last unfold to voxels."""

    def __init__(self, widths: Sequence[int], first_stride: int, decoder_width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv3d(width, decoder_width, 1) for width in widths)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(decoder_width, decoder_width, 3, padding=1),
                nn.GroupNorm(math.gcd(8, decoder_width), decoder_width),
                nn.GELU(),
            )
            for _ in widths
        )
        self.logit = nn.ConvTranspose3d(decoder_width, 1, first_stride, first_stride)
        # Most crops show no sac, the others fill 1 % with it: start there. From a mean far off, every layer
        # below learns one constant that shifts the mask, and the features of all candidates become alike.
        nn.init.constant_(self.logit.bias, math.log(SAC_SHARE / (1 - SAC_SHARE)))  # pyright: ignore[reportArgumentType]

    def forward(
        self, stages: Sequence[Tensor], crop: Sequence[int]
    ) -> tuple[Float[Tensor, "b c p q r"], Float[Tensor, "b 1 d h w"]]:
        """Finest decoder features and mask logits of the crop's size."""
        x = self.smooth[-1](self.lateral[-1](stages[-1]))
        for index in range(len(stages) - 2, -1, -1):
            x = F.interpolate(x, stages[index].shape[2:], mode="trilinear", align_corners=False)
            x = self.smooth[index](x + self.lateral[index](stages[index]))
        d, h, w = crop
        return x, self.logit(x)[..., :d, :h, :w]  # odd crops come back one voxel larger


def mask_evidence(mask_logit: Float[Tensor, "b 1 d h w"], sigma: float) -> Float[Tensor, "b 3"]:
    """What the mask says for an aneurysm in the middle: strongest logit, volume in the middle, volume.

    The logit is that of a 3x3x3 neighbourhood, so that one bright voxel is no sac; volumes are logarithms of
    expected voxels. All of about unit size.
    """
    crop = mask_logit.shape[2:]
    distance2 = torch.zeros((), device=mask_logit.device)
    for axis, size in enumerate(crop):
        shape = [1, 1, 1]
        shape[axis] = size
        distance2 = distance2 + _voxels_from_centre(size, size, mask_logit).view(shape) ** 2
    nearness = torch.exp(-distance2 / (2 * sigma**2)).to(mask_logit.dtype)
    smooth = F.avg_pool3d(mask_logit, 3, stride=1, padding=1, count_include_pad=False)
    # Far from the middle a peak counts less: it is somebody else's aneurysm.
    strongest = (smooth + nearness.clamp_min(1e-4).log()).flatten(1).amax(1)
    p = mask_logit.sigmoid()
    volumes = torch.stack([(p * nearness).flatten(1).sum(1), p.flatten(1).sum(1)], dim=1)
    return torch.cat((strongest[:, None] / 4, (torch.log1p(volumes) - 3) / 2), dim=1)


class RunningScale(nn.Module):
    """Standardises features by running statistics of the valid rows, the same in training and evaluation.

    Batch statistics would make a candidate's score depend on its neighbours. Flow features range over
    decades, so they are also clipped to +-5. Invalid or non-finite rows become 0.
    """

    def __init__(self, features: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.square: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.ones(features))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Float[Tensor, "b f"], valid: Bool[Tensor, "b"]) -> Float[Tensor, "b f"]:
        """Standardised rows (b, f) without gradient; zeros where not valid."""
        x = x.detach().to(self.mean.dtype)
        valid = valid & x.isfinite().all(1)
        x = torch.where(valid[:, None], x, torch.zeros_like(x))
        if self.training:
            with torch.no_grad():
                # over the whole batch, of which this process may hold a part
                count, sums = total(valid.sum()), total(torch.stack((x.sum(0), (x**2).sum(0))))
                # an average over the first batches, then an exponential one; no step without valid rows
                rate = torch.where(count > 0, (1 / (self.seen + 1)).clamp(min=self.momentum), 0.0)
                rows = count.clamp(min=1)
                self.mean.lerp_(sums[0] / rows, rate)
                self.square.lerp_(sums[1] / rows, rate)
                self.seen += (count > 0).to(self.seen.dtype)
        deviation = (self.square - self.mean**2).clamp(min=1e-6).sqrt()
        return torch.where(valid[:, None], ((x - self.mean) / deviation).clamp(-5, 5), torch.zeros_like(x))


class ExpertNet(nn.Module):
    """Classifies, locates and segments the candidate in the centre of a crop.

    Fusion and metadata gate depend on the backbone's widths, so they come as callables (in a config:
    `_partial_: true`) and are built here. A physics head does not and comes built.

    Args:
        backbone: see `Encoder`; oscillators are a part of it. Its own patch embedding is frozen, the fusion's
            stems replace it.
        fusion: called as fusion(width=...), e.g. a partial of `CrossAttentionFusion`.
        metadata: called as metadata(channels=...), e.g. a partial of `MetadataGate`; None for none.
        physics: module with `latent_dim` and `feature_count`, called as physics(latent (b, latent_dim),
            flow, progress) -> `FlowReading`; skipped for batches without flow points; None for none.
        graph_features: f of the batch's graph features.
        head_width: size of the embedding and of the heads. dropout: before the heads.
        decoder_width: channels of the mask decoder.
        centre_sigma: width of the window around the candidate, in voxels of the crop.
    """

    def __init__(
        self,
        backbone: Encoder,
        fusion: Callable[..., nn.Module],
        metadata: Callable[..., nn.Module] | None = None,
        physics: nn.Module | None = None,
        graph_features: int = 8,
        head_width: int = 64,
        dropout: float = 0.2,
        decoder_width: int = 32,
        centre_sigma: float = 6.0,
    ) -> None:
        super().__init__()
        widths, strides = list(backbone.widths), list(backbone.strides)
        self.backbone = backbone
        backbone.patch_embed.requires_grad_(False)
        self.fusion = fusion(width=widths[0])
        self.metadata = metadata(channels=widths[-1]) if metadata else None
        self.decoder = MaskDecoder(widths, strides[0], decoder_width)
        # Looking at the centre costs little on fine maps; stride 2 is left to the decoder's features.
        self.centre_stages = [index for index, stride in enumerate(strides) if stride in (4, 8)]
        self.centre_sigma = centre_sigma
        sizes = [widths[-1], *(widths[index] for index in self.centre_stages), decoder_width, decoder_width]
        # Over the batch, not over the channels: what all candidates share says nothing about one of them.
        self.norm = nn.BatchNorm1d(sum(sizes), affine=False)
        self.embed = nn.Sequential(nn.Linear(sum(sizes), head_width), nn.GELU(), nn.LayerNorm(head_width))
        self.dropout = nn.Dropout(dropout)

        self.known_graph, self.known_position = LearnedMissing(graph_features), LearnedMissing(3)
        self.classify = nn.Linear(head_width + graph_features + EVIDENCE, head_width)
        self.logit = nn.Linear(head_width, 1)
        # The expert starts as the stage that proposed the place, which saw the whole tree, and corrects it.
        nn.init.normal_(self.logit.weight, std=0.01)
        nn.init.zeros_(self.logit.bias)
        self.trust = nn.Parameter(torch.ones(()))
        self.locate = nn.Sequential(
            nn.Linear(head_width + 3 + SLOTS, head_width), nn.GELU(), nn.Linear(head_width, len(LOCATIONS))
        )
        self.place_score = nn.Conv3d(decoder_width, 1, 1, bias=False)  # a bias would cancel in the softmax
        self.offset = nn.Linear(head_width + 3, 3)

        self.physics = physics
        if physics is not None:
            latent, features = int(physics.latent_dim), int(physics.feature_count)  # pyright: ignore
            self.to_latent = nn.Linear(head_width, latent)
            self.flow_scale = RunningScale(features)
            self.from_flow = nn.Linear(features, head_width, bias=False)
            nn.init.zeros_(self.from_flow.weight)

    def forward(self, batch: ExpertBatch, progress: float = 1.0) -> ExpertOutput:
        """Everything the expert says about candidates; `progress` 0..1 of training steers the physics.

        Raises:
            ValueError: the parts of the batch do not belong together; names the part.
        """
        self._expect(batch)
        crop = batch.image.shape[2:]
        encoding = self.backbone.encode(self.fusion(batch.image, batch.present, batch.vessel))
        stages = list(encoding.maps)
        if self.metadata is not None:
            encoded = encode_metadata(batch.age, batch.sex, batch.present)
            stages[-1] = self.metadata(stages[-1], encoded)
        fine, mask_logit = self.decoder(stages, crop)
        # In bfloat16 an offset of 8 mm has steps of 0.06 mm, and probabilities near 1 coincide.
        with torch.autocast(fine.device.type, enabled=False):
            single = self.logit.weight.dtype
            stages = [stage.to(single) for stage in stages]
            return self._answer(
                batch, progress, stages, fine.to(single), mask_logit.to(single), encoding.oscillators
            )

    def _expect(self, batch: ExpertBatch) -> None:
        rows, crop = len(batch.image), tuple(batch.image.shape[2:])
        expect_map("Expert (image)", batch.image, SLOTS)
        expect_map("Expert (vessel)", batch.vessel, 1)
        if batch.vessel.shape != (rows, 1, *crop):
            raise ValueError(
                f"Expert (vessel): got {tuple(batch.vessel.shape)} for images of {tuple(batch.image.shape)}, "
                f"expected {(rows, 1, *crop)}."
            )
        expect_rows("Expert (present)", batch.present, SLOTS, rows)
        expect_rows("Expert (position)", batch.position, 3, rows)
        expect_rows("Expert (graph)", batch.graph, len(self.known_graph.value), rows)
        for name in ("age", "sex", "score"):
            expect_rows(f"Expert ({name})", getattr(batch, name)[:, None], 1, rows)

    def _answer(
        self,
        batch: ExpertBatch,
        progress: float,
        stages: list[Tensor],
        fine: Float[Tensor, "b c p q r"],
        mask_logit: Float[Tensor, "b 1 d h w"],
        oscillators: list[OscillatorState],
    ) -> ExpertOutput:
        crop = batch.image.shape[2:]
        embedding = self._pool(stages, fine, mask_logit, crop)  # (b, head_width)

        reading, hint = self._read_flow(embedding, batch, progress)
        seen = self.dropout(embedding)
        # Detached here and in `_pool`: the classifier must not bend the mask to get at what it likes.
        evidence = mask_evidence(mask_logit.detach(), self.centre_sigma)
        hidden = self.classify(torch.cat((seen, self.known_graph(batch.graph), evidence), dim=1)) + hint
        location = (seen, self.known_position(batch.position), batch.present.to(seen.dtype))
        place = expected_place(self.place_score(fine), crop) / 10  # about unit size
        return ExpertOutput(
            logit=self.trust * log_odds(batch.score) + self.logit(F.gelu(hidden)).squeeze(1),
            location_logits=self.locate(torch.cat(location, dim=1)),
            mask_logit=mask_logit,
            offset_mm=MAX_OFFSET_MM * torch.tanh(self.offset(torch.cat((seen, place), dim=1))),
            order_parameter=(
                oscillators[-1].synchrony if oscillators else torch.full_like(batch.age, torch.nan)
            ),
            oscillators=oscillators,
            physics=reading,
            embedding=embedding,
        )

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Start from a pretrained backbone's state dict: its encoder, and its embedding in every stem."""
        self.backbone.load_pretrained(state)
        self.fusion.load_stem(self.backbone.patch_embed.state_dict())  # pyright: ignore[reportCallIssue]

    def _pool(
        self, stages: list[Tensor], fine: Tensor, mask_logit: Tensor, crop: Sequence[int]
    ) -> Float[Tensor, "b e"]:
        """Global average, windows around the candidate, and what lies under the predicted mask."""
        mask = F.interpolate(mask_logit.detach().sigmoid(), fine.shape[2:], mode="area")
        under_mask = (fine * mask).flatten(2).sum(2) / mask.flatten(2).sum(2).clamp(min=1e-6)
        parts = [
            stages[-1].flatten(2).mean(2),
            *(centre_pool(stages[index], crop, self.centre_sigma) for index in self.centre_stages),
            centre_pool(fine, crop, self.centre_sigma),
            under_mask,
        ]
        return self.embed(self._standardised(torch.cat(parts, dim=1)))

    def _standardised(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """Zero mean and unit spread over the candidates seen in training; a batch of one has no spread."""
        if self.training and rows_in_all(pooled) > 1:
            return self.norm(pooled)
        return F.batch_norm(pooled, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)

    def _read_flow(
        self, embedding: Float[Tensor, "b e"], batch: ExpertBatch, progress: float
    ) -> tuple[FlowReading | None, Tensor | float]:
        """The physics head's reading and what it adds to the classifier, nothing at the start.

        The features are detached: the flow informs the classifier, but the classifier cannot make a flow look
        more or less plausible than the equations allow.
        """
        if self.physics is None or batch.flow is None:
            return None, 0.0
        reading = self.physics(self.to_latent(embedding), batch.flow, progress)
        return reading, self.from_flow(self.flow_scale(reading.features, reading.valid))
