"""The tables that stages hand to each other: columns, types and units, declared once and checked on read."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from aneurysm.data.files import replacing
from aneurysm.data.labels import LOCATIONS

LOCATION_KEYS = tuple(f"location_{i}" for i in range(len(LOCATIONS)))


@dataclass(frozen=True)
class Table:
    """A contract for one parquet file."""

    name: str
    columns: dict[str, str]  # column -> pandas dtype

    def conform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the declared columns with the declared types.

        Raises:
            ValueError: a column is missing or cannot be converted; the message names it.
        """
        missing = [column for column in self.columns if column not in frame.columns]
        if missing:
            raise ValueError(f"The {self.name} table lacks {missing}; it has {list(frame.columns)}.")
        try:
            return pd.DataFrame(frame[list(self.columns)]).astype(self.columns).reset_index(drop=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The {self.name} table has a column of the wrong type: {error}") from error

    def write(self, frame: pd.DataFrame, path: Path) -> None:
        """Write atomically: a reader sees the old file or the whole new one."""
        with replacing(path) as part:
            self.conform(frame).to_parquet(part, index=False)

    def read(self, path: Path) -> pd.DataFrame:
        """Read and check against the contract."""
        if not path.is_file():
            raise FileNotFoundError(f"No {self.name} table at {path}. Run the stage that writes it first.")
        return self.conform(pd.read_parquet(path))


# One row per series: what exists and what is known about it. Unknown labels are NaN.
INDEX = Table(
    "index",
    {
        "series_uid": "str",
        "patient_id": "str",
        "modality": "str",  # CTA, MRA, T1, T2
        "age": "float32",  # years, NaN when missing
        "sex": "str",  # M, F, or empty
        "site": "str",
        **dict.fromkeys(LOCATION_KEYS, "float32"),  # 0, 1, NaN unknown
        "present": "float32",  # 0, 1, NaN unknown
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
        "score": "float32",  # 0..1, graph attention anomaly score
        "node": "int64",  # nearest node of the vessel graph
        "radius_mm": "float32",  # of the vessel at that node
        "fold": "int64",  # the model that had not seen this patient
    },
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
        "flow_coherence": "float32",  # mean alignment of flow with the vessel, NaN without flow
        "volume_mm3": "float32",  # of the predicted sac
    },
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
