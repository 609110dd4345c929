"""The nets that score nodes train through Lightning as a fold does, and what they leave is read back."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from synthetic_trees import cube, draw, random_tree

from aneurysm.build import (
    build_graph_net,
    build_segmenter_loss,
    graph_settings,
    has_graph_net,
    segmenter_channels,
)
from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.data.scan import Lesion
from aneurysm.data.tables import CANDIDATES
from aneurysm.stages.smart_net import (
    GraphData,
    GraphItem,
    GraphModule,
    GraphSettings,
    candidate_rows,
    candidates,
    fitted_fusion,
    node_scores,
    patient_parts,
)
from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES
from aneurysm.vessels.graph import build_graph
from aneurysm.vessels.peaks import Peaks

GRID = cube(64, 1.1)
SETTINGS = GraphSettings(2.0, 5, 5.0)


def configured(*overrides: str):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture(scope="module")
def items() -> list[GraphItem]:
    rng = np.random.default_rng(4)
    found = []
    for i in range(9):
        tree, centre, radius = random_tree(rng, sac=i % 3 != 2)
        lesions = (Lesion(centre, radius),) if radius else ()
        far = np.array([[60.0, 8.0, 8.0]])  # the heat map's false alarm
        centres = np.concatenate([centre[None], far]) if radius else far
        peaks = Peaks(centres, np.array([0.8, 0.4])[: len(centres)])
        graph = build_graph(draw(GRID, tree), GRID)
        found.append(GraphItem(f"s{i}", graph, GRID, lesions, bool(radius), peaks))
    return found


def trained(net, data: GraphData, epochs: int = 10):
    nodes = torch.cat([d.x for d in data.train])
    net.calibrate(nodes, torch.cat([d.edge_attr for d in data.train]))
    module = GraphModule(net, 5e-3, epochs * data.steps)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, data)
    return net.eval(), trainer.callback_metrics


@pytest.mark.parametrize(
    "overrides",
    [
        ["smart_net.graph_members=2"],
        ["graph_net=gcn", "graph_net.norm=graph", "smart_net.graph_members=1"],
        ["graph_net=masked_regression"],
        ["graph_net=mlp", "smart_net.unsupervised=true", "smart_net.anomaly.layers=4"],
    ],
)
def test_every_net_learns_to_tell_nodes_on_sacs(items, overrides):
    cfg = configured(*overrides)
    torch.manual_seed(0)
    net = build_graph_net(cfg, len(NODE_FEATURES), len(EDGE_FEATURES))
    assert net is not None
    parts = patient_parts([i.series_uid for i in items], int(cfg.smart_net.graph_members), seed=0)
    net, figures = trained(net, GraphData(items[:8], items[8:], batch=4, seed=0, parts=parts[:8]))
    assert np.isfinite(float(figures["train/loss"])) and "val/loss" in figures
    on, off = [], []
    for item in items[:8]:
        score, label = node_scores(net, item.graph), item.to_data().y.numpy()
        on += score[label == 1].tolist()
        off += score[label == 0].tolist()
    assert np.mean(np.array(on)[:, None] > np.array(off)) > 0.7  # AUC


def test_a_member_learns_nothing_from_its_own_part(items):
    cfg = configured("smart_net.graph_members=2", "graph_net.dropout=0.0")
    parts = [0, 1, 0, 1, 0, 1]
    changed = [
        item if part == 1 else GraphItem(item.series_uid, item.graph, GRID, (), False, item.peaks)
        for item, part in zip(items[:6], parts, strict=True)
    ]
    scores = []
    for train in (items[:6], changed):  # other labels in part 0
        torch.manual_seed(0)
        net = build_graph_net(cfg, len(NODE_FEATURES), len(EDGE_FEATURES))
        data = GraphData(train, [], batch=6, seed=0, parts=parts)
        module = GraphModule(net, 1e-3, 2)
        net.train()
        nodes = torch.cat([d.x for d in data.train])
        net.calibrate(nodes)
        batch = next(iter(data.train_dataloader()))
        loss, _ = module._members(batch, (batch.x, batch.edge_index, batch.edge_attr, batch.batch))
        loss.backward()
        scores.append([[p.grad.clone() for p in member.parameters()] for member in net.members])
    for a, b in zip(scores[0][0], scores[1][0], strict=True):  # member 0 never saw them
        torch.testing.assert_close(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(scores[0][1], scores[1][1], strict=True))


def test_fusion_lifts_true_peaks_and_rows_are_read_back(items, tmp_path):
    scores = [node_scores(None, item.graph) for item in items]
    fusion = fitted_fusion(items, scores, SETTINGS)
    assert fusion is not None and fusion.node > 0 and fusion.height > 0
    heat = GraphSettings(2.0, 5, 5.0, source="heatmap")
    alone = fitted_fusion(items, scores, heat)
    assert alone is not None
    item = items[0]
    best = candidates(item.graph, scores[0], item.peaks, GRID, heat, alone)[0]
    assert np.linalg.norm(best.centre_mm - item.lesions[0].centre_mm) < 1e-6 and best.score > 0.5
    arteries = np.zeros(GRID.shape, np.uint8)
    arteries[draw(GRID, [((36, 36, 0), (36, 36, 66), 9.0, 9.0)])] = 7  # right supraclinoid carotid
    found = candidates(item.graph, scores[0], item.peaks, GRID, SETTINGS, fusion, arteries)
    CANDIDATES.write(candidate_rows("s0", found, fold=0), tmp_path / "c.parquet")
    again = CANDIDATES.read(tmp_path / "c.parquet")
    assert len(again) == len(found) <= 5
    assert set(again.source) <= {"graph", "heatmap", "both"}
    assert "Right Supraclinoid Internal Carotid Artery" in set(again.region)
    old = again.drop(columns=["source", "region"])
    assert (CANDIDATES.conform(old)[["source", "region"]] == "").all().all()


def test_patients_are_dealt_whole_and_evenly():
    patients = [f"p{i // 2}" for i in range(20)]
    parts = patient_parts(patients, 3, seed=0)
    assert all(parts[i] == parts[i + 1] for i in range(0, 20, 2))
    assert sorted(np.bincount(parts).tolist()) == [6, 6, 8]


def test_settings_that_cannot_be_are_refused():
    for override, said in (
        ("smart_net.candidates.source=expert", "graph, heatmap, union"),
        ("smart_net.candidates.min_score=1", "below 1"),
    ):
        with pytest.raises(UserError, match=said):
            graph_settings(configured(override).smart_net)
    with pytest.raises(UserError, match="none, gaussian"):
        segmenter_channels(configured("smart_net.heatmap=yes"))
    for override in ("heatmap_sigma_mm=0", "heatmap_loss=mse", "heatmap_weight=0"):
        with pytest.raises(UserError, match=r"smart_net\.heatmap"):
            build_segmenter_loss(configured("smart_net.heatmap=gaussian", f"smart_net.{override}"))
    with pytest.raises(UserError, match="at least one net"):
        build_graph_net(configured("smart_net.graph_members=0"), 25, 8)
    with pytest.raises(UserError, match="width are no node features"):
        build_graph_net(configured("graph_net=masked_regression", "graph_net.targets=[width]"), 25, 8)
    assert not has_graph_net(configured("graph_net=none"))
    assert not has_graph_net(configured("smart_net.candidates.source=heatmap"))
