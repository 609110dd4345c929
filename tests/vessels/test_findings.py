"""Crops of candidates are the same with loader processes, and what they share is worked out once."""

import numpy as np
import torch
from synthetic_trees import SACS, TREE, cube, draw

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Lesion
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.stages.expert import ExpertData
from aneurysm.stages.findings import CropSettings, Finding
from aneurysm.vessels.candidates import Candidate
from aneurysm.vessels.graph import build_graph

GRID = cube()


def findings() -> list[Finding]:
    """An aneurysm and two places on healthy vessel, one crop each."""
    sac = SACS["sidewall"]
    mask = draw(GRID, [*TREE, sac])
    graph = build_graph(mask, GRID)
    image = np.random.default_rng(0).normal(0, 0.1, GRID.shape).astype(np.float32) + mask
    lesion = Lesion(np.array(sac[0], float), 3.0)
    case = PreparedCase(
        "s", "p", "MRA", image, GRID, mask.astype(np.uint8), None, (lesion,), 50.0, "F", True,
        np.full(13, np.nan, np.float32), GRID, float(image.min()),
    )  # fmt: skip
    probability = {"vessel": mask.astype(np.float32)}
    places = [(lesion.centre_mm, 1.0), *((graph.position[n], 0.0) for n in (3, len(graph) // 2))]
    return [
        Finding(case, probability, graph, k, Candidate(np.asarray(at), 0.5, 3, 2.0), 0.5, is_aneurysm=label)
        for k, (at, label) in enumerate(places)
    ]


def data(workers: int) -> ExpertData:
    return ExpertData(
        findings(), [], CropSettings(16, flow=True), batch=3, steps=2, positive_share=0.4, jitter_mm=1.0,
        seed=0, workers=workers,
    )  # fmt: skip


def tensors(flow: FlowPoints) -> list[torch.Tensor]:
    """Everything that flow points consist of."""
    kept: list[torch.Tensor] = []
    flow.map(lambda tensor: kept.append(tensor) or tensor)
    return kept


def test_crops_do_not_depend_on_loader_processes_nor_on_what_is_worked_out_before_them():
    alone, helped = data(0), data(1)
    for one in (alone, helped):
        one.setup("fit")
    assert not any("_flow_points" in f.__dict__ for f in alone.train)
    # A loader process ends with its epoch: what is not there before would be worked out in every epoch.
    assert all("_flow_points" in f.__dict__ and "graph_features" in f.__dict__ for f in helped.train)
    assert any(bool(f.__dict__["_flow_points"].valid) for f in helped.train)
    batches = zip(alone.train_dataloader(), helped.train_dataloader(), strict=True)
    for (inputs, target), (inputs_too, target_too) in batches:
        for name in ("image", "vessel", "position", "graph", "score"):
            assert torch.equal(getattr(inputs, name), getattr(inputs_too, name))
        for mine, theirs in zip(tensors(inputs.flow), tensors(inputs_too.flow), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(target.mask, target_too.mask)
        assert torch.equal(target.offset_mm.nan_to_num(), target_too.offset_mm.nan_to_num())
