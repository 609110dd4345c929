"""Write phantom patients to look at or to predict: python -m aneurysm.data.phantom <folder> --patients 2"""

import argparse
from pathlib import Path

from aneurysm.data.phantom.dataset import PhantomSource


def main() -> None:
    """Write the patients and print the folder of each series."""
    parser = argparse.ArgumentParser(description="Write phantom patients as an RSNA 2025 data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=1)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--size", type=int, default=96, help="voxels per side")
    parser.add_argument("--modality", nargs="+", default=["CTA", "MRA", "T1", "T2"])
    arguments = parser.parse_args()
    source = PhantomSource(
        arguments.folder,
        arguments.patients,
        arguments.seed,
        size=arguments.size,
        modalities=arguments.modality,
        jobs=1,
    )
    for row in source.index().to_dict("records"):
        state = "with an aneurysm" if row["present"] == 1 else "without an aneurysm"
        print(f"{row['modality']} {state}: {source.root / 'series' / str(row['series_uid'])}")


if __name__ == "__main__":
    main()
