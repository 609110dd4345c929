"""The same seed gives the same weights bit by bit, another gives others; what a GPU may change is known."""

import importlib.util
from pathlib import Path

import hydra
import pytest
import torch
from safetensors.torch import load_file

from aneurysm.command_line import config_folder
from aneurysm.experiment import open_experiment
from aneurysm.train import train

ROOT = Path(__file__).parents[1]
SMALL = (
    "experiment=smoke", "fold=0", "trainer.progress=none", "trainer.threads=1", "data.jobs=1",
    "pretrain.epochs=1", "vessel.rule_scans=1", "vessel.flips=[]",
    "smart_net.rule_scans=1", "smart_net.graph_epochs=1",
    "expert.epochs=1",
)  # fmt: skip


def weights(outputs: Path, stage: str, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        given = [*SMALL, f"paths.outputs={outputs}", f"experiment_name={name}", f"stage={stage}", *overrides]
        cfg = hydra.compose("train", overrides=given)
    train(cfg)
    return load_file(open_experiment(cfg).run(stage, 0).read_product("weights.safetensors"))


def check(stage: str, outputs: Path) -> None:
    first, again = weights(outputs, stage, "first"), weights(outputs, stage, "again")
    other = weights(outputs, stage, "first", "seed=1")
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def test_pretraining_is_a_function_of_its_seed(outputs):
    check("pretrain", outputs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vessel", "segmenter", "smart_net", "expert"])
def test_every_stage_is_a_function_of_its_seed(stage, outputs):
    check(stage, outputs)


def listing():
    spec = importlib.util.spec_from_file_location("determinism", ROOT / "benchmarks" / "determinism.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_are_named_as_the_documentation_names_them():
    determinism = listing()
    x = torch.rand(1, 2, 4, 4, 4, requires_grad=True)
    with determinism.Operations() as seen:
        y = torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear")
        torch.nn.functional.avg_pool3d(y, 2).sum().backward()
        torch.zeros(3).index_add(0, torch.tensor([0, 0]), torch.ones(2))
        torch.zeros(3).scatter_add_(0, torch.tensor([0, 0]), torch.ones(2))
        torch.arange(3).cumsum(0)  # whole numbers are exact in any order
    assert {"upsample_trilinear3d_backward", "avg_pool3d_backward"} <= seen.names & set(
        determinism.NO_OTHER_KERNEL
    )
    assert {"index_add", "scatter_add"} <= seen.names & set(determinism.OTHER_KERNEL)
    assert "cumsum" not in seen.names


def test_the_tables_are_those_of_this_torch():
    said = torch.use_deterministic_algorithms.__doc__ or ""
    for word in (
        "AvgPool3d",
        "AdaptiveAvgPool3d",
        "trilinear",
        "grid_sample",
        "cumsum",
        "bincount",
        "median",
        "histc",
    ):
        assert word in said.split("operations will throw a")[1], word
    for word in ("index_add", "scatter_add", "Conv3d", "MaxPool3d", "repeat_interleave", "ReplicationPad3d"):
        assert word in said.split("operations will throw a")[0], word


@pytest.mark.slow
def test_the_page_says_what_the_stages_do(tmp_path):
    determinism = listing()
    assert (
        determinism.page(determinism.operations(tmp_path)) == (ROOT / "docs" / "determinism.md").read_text()
    )


@pytest.mark.parametrize("value", ["true", "warn"])
def test_deterministic_reaches_torch(value, outputs, monkeypatch):
    seen = []
    import lightning.pytorch.trainer.connectors.accelerator_connector as connector

    real = connector._set_torch_flags
    monkeypatch.setattr(
        connector, "_set_torch_flags", lambda **flags: (seen.append(flags["deterministic"]), real(**flags))
    )
    try:
        weights(
            outputs,
            "pretrain",
            f"deterministic-{value}",
            f"trainer.deterministic={value}",
            "pretrain.steps=1",
        )
        assert seen == [True if value == "true" else "warn"]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (value == "warn")
    finally:
        torch.use_deterministic_algorithms(False)
