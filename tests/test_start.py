"""What a command imports before it does anything: seconds that everybody waits for, every time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Everything here takes more than a tenth of a second; what answers a command line needs none of it.
HEAVY = ("torch", "lightning", "monai", "torch_geometric", "xgboost", "sklearn", "scipy", "pandas",
         "matplotlib", "SimpleITK", "nibabel", "pydicom", "skimage", "wandb", "optuna")  # fmt: skip


def imported(code: str) -> set[str]:
    """Top-level modules that are loaded after `code`."""
    tell = "import sys; print('loaded:', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("loaded:"))
    return set(line.split()[1:])


def command(script: str, *arguments: str) -> str:
    return (
        f"import runpy, sys; sys.argv = {[script, *arguments]!r}\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end: print('code:', end.code)"
    )


@pytest.mark.parametrize(
    "code",
    [
        command("train.py", "oscilator_dim=8"),
        command("train.py", "-m", "loss=tversky,dice_ce", "los.fn_weight=1"),
        command("predict.py", "--help"),
    ],
)
def test_a_wrong_command_and_help_are_answered_without_the_heavy_libraries(code):
    assert imported(code).isdisjoint(HEAVY)


def test_training_does_not_import_what_only_some_trainings_need():
    assert imported("import aneurysm.train").isdisjoint({"torch_geometric", "wandb", "vtk", "ray", "dask"})
