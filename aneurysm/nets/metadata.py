"""Age, sex and modality that turn feature channels up or down.

What is unknown is never guessed: a missing field uses a learned vector of its own, and fields are made
missing at random in training so that the net copes without them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.global_batch import rand_rows
from aneurysm.nets.shapes import expect_map, expect_rows

# Columns of encoded metadata: age, age missing, sex, sex missing, four modality flags.
METADATA_FEATURES = 8
_FIELDS = {"age": slice(0, 1), "sex": slice(2, 3), "modality": slice(4, 8)}


def encode_metadata(
    age: Float[Tensor, "b"], sex: Float[Tensor, "b"], modality: Bool[Tensor, "b 4"]
) -> Float[Tensor, "b 8"]:
    """Patient data as numbers of similar size, with a flag for what is missing.

    Args:
        age: years, NaN when unknown. sex: 0 male, 1 female, NaN when unknown. modality: present slots.
    Returns:
        (age - 60) / 20, age missing, sex as -1 / +1, sex missing, four modality flags; 0 where missing.
    Raises:
        ValueError: for an age outside 0..130 years or a sex other than 0, 1, NaN.
    """
    no_age, no_sex = age.isnan(), sex.isnan()
    if not (no_age | ((age >= 0) & (age <= 130))).all():
        raise ValueError(f"Age must be 0..130 years or NaN, got {age.tolist()}. Check the unit of the age.")
    if not (no_sex | (sex == 0) | (sex == 1)).all():
        raise ValueError(f"Sex must be 0 (male), 1 (female) or NaN (unknown), got {sex.tolist()}.")
    columns = torch.stack(
        (
            torch.where(no_age, torch.zeros_like(age), (age - 60) / 20),
            no_age.to(age.dtype),
            torch.where(no_sex, torch.zeros_like(sex), 2 * sex - 1),
            no_sex.to(age.dtype),
        ),
        dim=1,
    )
    return torch.cat((columns, modality.to(age.dtype)), dim=1)


class LearnedMissing(nn.Module):
    """Replaces NaN in a vector of features by a learned value per feature, zero at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(features))

    def forward(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """The features without NaN."""
        return torch.where(x.isnan(), self.value.to(x.dtype), x)


class MetadataEmbedding(nn.Module):
    """Sum of one embedding per field; a missing field contributes its learned missing vector."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"Metadata dropout is a probability in [0, 1), got {dropout}.")
        self.dropout = dropout
        self.fields = nn.ModuleList(
            nn.Linear(columns.stop - columns.start, hidden) for columns in _FIELDS.values()
        )
        self.missing = nn.Parameter(torch.randn(len(_FIELDS), hidden) * 0.1)
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, metadata: Float[Tensor, "b 8"]) -> Float[Tensor, "b hidden"]:
        """Encoded metadata -> embedding; in training each field goes missing with probability `dropout`."""
        expect_rows("MetadataEmbedding", metadata, METADATA_FEATURES)
        no_modality = metadata[:, 4:8].sum(1) == 0
        missing = torch.stack((metadata[:, 1] > 0, metadata[:, 3] > 0, no_modality), dim=1)  # (b, 3)
        if self.training and self.dropout > 0:
            missing = missing | (rand_rows(*missing.shape, device=missing.device) < self.dropout)
        total = self.missing.new_zeros(metadata.shape[0], self.missing.shape[1])
        for index, (columns, embed) in enumerate(zip(_FIELDS.values(), self.fields, strict=True)):
            known = embed(metadata[:, columns])
            total = total + torch.where(missing[:, index, None], self.missing[index], known)
        return F.gelu(self.mix(F.gelu(total)))


class MetadataGate(nn.Module):
    """Scales every channel by 2 * sigmoid(W embedding), which is exactly 1 before training.

    A plain sigmoid would start by halving pretrained features; the factor two makes the start an identity
    while keeping the gate in (0, 2).

    Args:
        channels: of the feature map. hidden: of the embedding. dropout: probability per field, training only.
    """

    def __init__(self, channels: int, hidden: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = MetadataEmbedding(hidden, dropout)
        self.gate = nn.Linear(hidden, channels)
        _zero(self.gate)

    def forward(
        self, features: Float[Tensor, "b c d h w"], metadata: Float[Tensor, "b 8"]
    ) -> Float[Tensor, "b c d h w"]:
        """Features (b, c, d, h, w) gated by metadata from `encode_metadata`."""
        expect_map("MetadataGate", features, self.gate.out_features)
        gate = 2 * self.gate(self.embedding(metadata)).sigmoid()
        return features * gate[:, :, None, None, None].to(features.dtype)


class FilmGate(nn.Module):
    """Scales and shifts channels, (1 + s) F + t, with s = t = 0 before training (FiLM, arXiv 1709.07871).

    Args:
        channels: of the feature map. hidden: of the embedding. dropout: probability per field, training only.
    """

    def __init__(self, channels: int, hidden: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = MetadataEmbedding(hidden, dropout)
        self.modulation = nn.Linear(hidden, 2 * channels)
        _zero(self.modulation)

    def forward(
        self, features: Float[Tensor, "b c d h w"], metadata: Float[Tensor, "b 8"]
    ) -> Float[Tensor, "b c d h w"]:
        """Features (b, c, d, h, w) modulated by metadata from `encode_metadata`."""
        expect_map("FilmGate", features, self.modulation.out_features // 2)
        modulation = self.modulation(self.embedding(metadata))[:, :, None, None, None].to(features.dtype)
        scale, shift = modulation.chunk(2, dim=1)
        return (1 + scale) * features + shift


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
