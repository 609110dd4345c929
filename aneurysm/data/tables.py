"""The tables that stages hand to each other: columns, types and units, declared once and checked on read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aneurysm.data.files import replacing
from aneurysm.data.labels import LOCATIONS

LOCATION_KEYS = tuple(f"location_{i}" for i in range(len(LOCATIONS)))


@dataclass(frozen=True)
class Table:
    """A contract for one parquet file."""

    name: str
    columns: Mapping[str, str]  # column -> pandas dtype
    meanings: Mapping[str, str] = field(default_factory=dict)  # column -> unit and meaning, kept in the file
    defaults: Mapping[str, Any] = field(default_factory=dict)  # columns that a frame may lack

    def conform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the declared columns with the declared types; absent ones get their default.

        Raises:
            ValueError: a column is missing or cannot be converted; the message names it.
        """
        filled = [column for column in self.defaults if column not in frame.columns]
        if filled:
            frame = frame.assign(**{column: self.defaults[column] for column in filled})
        missing = [column for column in self.columns if column not in frame.columns]
        if missing:
            raise ValueError(f"The {self.name} table lacks {missing}; it has {list(frame.columns)}.")
        try:
            return pd.DataFrame(frame[list(self.columns)]).astype(dict(self.columns)).reset_index(drop=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The {self.name} table has a column of the wrong type: {error}") from error

    def write(self, frame: pd.DataFrame, path: Path) -> None:
        """Write parquet, or .csv by the suffix; a reader sees the old file or the whole new one.

        Every field of a parquet file's schema carries its unit and meaning as metadata `meaning`.
        """
        if path.suffix == ".csv":
            with replacing(path) as part:
                self.conform(frame).to_csv(part, index=False)
            return
        table = pa.Table.from_pandas(self.conform(frame), preserve_index=False)
        fields = [
            f.with_metadata({"meaning": self.meanings[f.name]}) if f.name in self.meanings else f
            for f in table.schema
        ]
        schema = pa.schema(fields, metadata=table.schema.metadata)
        with replacing(path) as part:
            pq.write_table(table.cast(schema), part)

    def read(self, path: Path) -> pd.DataFrame:
        """Read and check against the contract."""
        if not path.is_file():
            raise FileNotFoundError(f"No {self.name} table at {path}. Run the stage that writes it first.")
        return self.conform(pd.read_parquet(path))


# One row per series: what exists and what is known about it. Unknown labels are NaN, unknown texts empty.
INDEX = Table(
    "index",
    {
        "series_uid": "str",
        "patient_id": "str",
        "modality": "str",
        "age": "float32",
        "sex": "str",
        "site": "str",
        **dict.fromkeys(LOCATION_KEYS, "float32"),
        "present": "float32",
        "dataset": "str",
        "lesions": "float32",
        "has_vessel_mask": "bool",
        "has_aneurysm_mask": "bool",
        "path": "str",
        "note": "str",
    },
    meanings={
        "series_uid": "DICOM SeriesInstanceUID, or the name of the file",
        "patient_id": "folds never part the series of one patient",
        "modality": "CTA, MRA, T1 or T2",
        "age": "years; NaN unknown",
        "sex": "M, F or empty",
        "site": "where it was acquired; folds are balanced by it",
        **{key: f"{name}: 0, 1, or NaN unknown" for key, name in zip(LOCATION_KEYS, LOCATIONS, strict=True)},
        "present": "any aneurysm: 0, 1, or NaN unknown",
        "dataset": "which kind of source it came from",
        "lesions": "number of annotated aneurysms (points or masks); NaN unknown",
        "has_vessel_mask": "a vessel mask lies beside the series",
        "has_aneurysm_mask": "a lesion mask lies beside the series",
        "path": "file or folder of the images, relative to the root of the source",
        "note": "what is odd about the series as far as the tables tell; empty when nothing is",
    },
    defaults={
        "dataset": "",
        "lesions": float("nan"),
        "has_vessel_mask": False,
        "has_aneurysm_mask": False,
        "path": "",
        "note": "",
    },
)

# One row per candidate, from the Smart Net.
CANDIDATES = Table(
    "candidates",
    {
        "series_uid": "str",
        "candidate": "int64",  # 0, 1, ... by falling score
        "x_mm": "float64",  # RAS
        "y_mm": "float64",
        "z_mm": "float64",
        "score": "float32",  # 0..1, probability of an aneurysm as far as the Smart Net knows
        "node": "int64",  # nearest node of the vessel graph, -1 without a graph
        "radius_mm": "float32",  # of the vessel at that node
        "fold": "int64",  # the model that had not seen this patient
        "source": "str",  # graph, heatmap or both; empty in tables of before
        "region": "str",  # artery, one of labels.LOCATIONS; empty when unknown
    },
    meanings={
        "series_uid": "DICOM SeriesInstanceUID, or the name of the file",
        "candidate": "0, 1, ... by falling score",
        "x_mm": "centre, RAS mm",
        "y_mm": "centre, RAS mm",
        "z_mm": "centre, RAS mm",
        "score": "0..1, probability of an aneurysm as far as the Smart Net knows",
        "node": "nearest node of the vessel graph, -1 without a graph",
        "radius_mm": "mm, of the vessel at that node",
        "fold": "the model that had not seen this patient; -1: all of them",
        "source": "what proposed it: graph, heatmap or both; empty: not noted",
        "region": "artery that it lies on; empty: unknown",
    },
    defaults={"source": "", "region": ""},
)

# One row per candidate, from the expert.
EXPERT = Table(
    "expert predictions",
    {
        "series_uid": "str",
        "candidate": "int64",
        "fold": "int64",
        "seed": "int64",
        "x_mm": "float64",  # refined position, RAS
        "y_mm": "float64",
        "z_mm": "float64",
        "score": "float32",  # of the Smart Net, carried along
        "p": "float32",  # probability that the candidate is an aneurysm
        **{f"{key}_logit": "float32" for key in LOCATION_KEYS},
        "order_parameter": "float32",  # Kuramoto order parameter in 0..1, NaN without oscillators
        "physics_residual": "float32",  # log10 of the dimensionless Navier-Stokes residual, NaN without flow
        "has_flow": "float32",  # 1, or 0 where there is no vessel that blood could flow through
        "flow_driven": "float32",  # 1 by what flows in and out of the crop, 0 by a normalised flux
        "flow_coherence": "float32",  # mean alignment of flow with the vessel; NaN without flow, as the rest
        "flow_nematic_order": "float32",  # 1 when all flow is along one axis, 0 when it has none
        "flow_backflow": "float32",  # share of the lumen with flow against the vessel's direction
        "flow_slow": "float32",  # share of the lumen slower than a tenth of the parent vessel's mean speed
        "flow_energy": "float32",  # kinetic energy over that of Poiseuille's flow in the parent vessel
        "flow_wall_shear_pa": "float32",  # mean wall shear stress, Pa
        "flow_low_shear": "float32",  # share of the wall under less than 0.4 Pa
        "flow_flux_error": "float32",  # of the cross-sections, in the parent's flux: tells quality
        "volume_mm3": "float32",  # of the predicted sac
    },
    defaults=dict.fromkeys(
        (  # tables of former versions lack them
            "has_flow",
            "flow_driven",
            "flow_nematic_order",
            "flow_backflow",
            "flow_slow",
            "flow_energy",
            "flow_wall_shear_pa",
            "flow_low_shear",
            "flow_flux_error",
        ),
        float("nan"),
    ),
)

# One row per series, from the stacker: the 14 probabilities in submission order.
SCANS = Table(
    "scan predictions",
    {
        "series_uid": "str",
        "patient_id": "str",
        "fold": "int64",
        **{f"p_{key}": "float32" for key in (*LOCATION_KEYS, "present")},
    },
)

# One row per held-out series, from the vessel net and from the segmenter: what its lumen mask is worth.
_OVERLAP = {
    "recall": "share of the lumen voxels that are in the mask; NaN where vessels are not annotated",
    "precision": "share of the mask that is lumen; NaN for an empty mask",
    "dice": "overlap of mask and lumen",
    "cldice": "harmonic mean of the shares of either centreline inside the other mask",
    "betti0_error": "difference of the numbers of pieces",
    "betti1_error": "difference of the numbers of rings",
    "hd95_mm": "symmetric 95th percentile of surface distances, mm; NaN when a mask is empty",
    "recall_below_0_75mm": "recall where the vessel radius is below 0.75 mm, sacs left out",
    "recall_0_75_to_1_25mm": "recall where it is 0.75 to 1.25 mm",
    "recall_1_25_to_2mm": "recall where it is 1.25 to 2 mm",
    "recall_from_2mm": "recall where it is 2 mm or more",
    "sac_recall": "share of the sac voxels found by the sac channel; NaN without sacs or such a channel",
    "artery_accuracy": "share of the found voxels of named arteries with the right name; NaN without names",
    "lesions_in_roi": "share of the aneurysms whose centre is in the region of interest; NaN without any",
}
OVERLAP = Table(
    "lumen masks",
    {
        "series_uid": "str",
        "modality": "str",
        **dict.fromkeys(_OVERLAP, "float64"),
        "aneurysms": "int64",
        "aneurysms_centre": "int64",
        "aneurysms_half": "int64",
    },
    meanings={
        **_OVERLAP,
        "aneurysms": "aneurysms with a known place",
        "aneurysms_centre": "of them, how many have their centre voxel in the mask",
        "aneurysms_half": "of them, how many have at least half of their voxels in the mask",
    },
    defaults={"sac_recall": float("nan"), "artery_accuracy": float("nan"), "lesions_in_roi": float("nan")},
)
