"""The unsupervised score sees nothing of the node it judges, and finds what does not fit its surroundings."""

import pytest
import torch

from aneurysm.nets.graph_ensemble import GraphEnsemble
from aneurysm.nets.masked_regression import MaskedNodeRegression, WithAnomaly
from aneurysm.nets.vessel_gat import VesselGat, VesselGcn


def chain(nodes: int, seed: int = 0):
    """A tapering vessel: x holds a calibre, a copy of it and noise; edges hold the step of the calibre."""
    rng = torch.Generator().manual_seed(seed)
    taper = torch.linspace(1.0, -1.0, nodes) + torch.randn((), generator=rng)
    x = torch.stack([taper, 0.5 * taper, torch.randn(nodes, generator=rng)], dim=1)
    one = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    index = torch.cat([one, one.flip(0)], dim=1)
    step = (x[index[0], :1] - x[index[1], :1]).abs()
    return x, index, step, torch.zeros(nodes, dtype=torch.long)


def net(**settings) -> MaskedNodeRegression:
    torch.manual_seed(0)
    return MaskedNodeRegression(3, 1, [0, 1], hidden=16, layers=3, heads=2, reach=1, **settings)


def test_the_prediction_does_not_depend_on_the_node_its_neighbours_or_their_edges():
    model = net(dropout=0.0).eval()
    x, index, attr, batch = chain(15)
    asked = torch.zeros(15, dtype=torch.bool)
    asked[7] = True
    before, _ = model.predict(x, index, attr, batch, asked)
    changed, edges = x.clone(), attr.clone()
    changed[6:9] += 5.0
    touched = (index >= 6).logical_and(index <= 8).any(0)
    edges[touched] += 5.0
    after, _ = model.predict(changed, index, edges, batch, asked)
    torch.testing.assert_close(before[7], after[7])
    changed[5] += 5.0  # beyond the reach: visible
    seen, _ = model.predict(changed, index, edges, batch, asked)
    assert (seen[7] - after[7]).abs().max() > 1e-4


def test_a_bulge_that_was_never_shown_stands_out():
    graphs = [chain(24, seed) for seed in range(6)]
    model = net(dropout=0.0)
    model.calibrate(torch.cat([g[0] for g in graphs]), torch.cat([g[2] for g in graphs]))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        x, index, attr, batch = graphs[step % 6]
        loss = model.loss(x, index, attr, batch, torch.ones(24, dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-12:]) < sum(losses[:12])
    model.eval()
    x, index, attr, batch = chain(24, seed=99)
    with torch.no_grad():
        healthy = model(x, index, attr, batch)
        x = x.clone()
        x[10, :2] += 4.0
        score = model(x, index, attr, batch)
    assert int(score.argmax()) == 10 and float(score[10]) > float(healthy.max()) + 1
    with torch.no_grad():
        again = model(x, index, attr, batch)
    torch.testing.assert_close(score, again)  # hidden in a fixed order


def test_only_healthy_nodes_are_learned_from():
    model = net(dropout=0.0)
    x, index, attr, batch = chain(20)
    torch.manual_seed(3)
    nothing = model.loss(x, index, attr, batch, torch.zeros(20, dtype=torch.bool))
    assert float(nothing.detach()) == 0.0
    nothing.backward()
    torch.manual_seed(3)
    assert float(model.loss(x, index, attr, batch, torch.ones(20, dtype=torch.bool)).detach()) != 0.0
    empty = torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 1), batch[:0]
    assert model(*empty).shape == (0,)
    assert float(model.loss(*empty, torch.zeros(0, dtype=torch.bool)).detach()) == 0.0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="nothing is seen beyond"):
        MaskedNodeRegression(3, 1, [0], hidden=8, layers=2, heads=2, reach=2)
    with pytest.raises(ValueError, match="targets must be columns"):
        MaskedNodeRegression(3, 1, [3])
    with pytest.raises(ValueError, match="multiple of heads"):
        MaskedNodeRegression(3, 1, [0], hidden=9)


def test_the_score_is_a_feature_of_every_member_without_a_gradient():
    x, index, attr, batch = chain(12)
    anomaly = net()
    both = WithAnomaly(
        anomaly, GraphEnsemble([VesselGat(4, 1, hidden=8, heads=2), VesselGcn(4, 1, hidden=8)])
    )
    both.calibrate(x, attr)
    one, other = both.each(x, index, attr, batch)
    assert one.shape == other.shape == (12,) and both.members is both.net.members
    (one.sum() + other.sum()).backward()
    assert all(p.grad is None for p in anomaly.parameters())
    both.eval()
    mean = torch.stack(both.each(x, index, attr, batch)).mean(0)
    torch.testing.assert_close(both(x, index, attr, batch), mean)
    wide = both.widened(x, index, attr, batch)
    torch.testing.assert_close(wide[:, 3], anomaly(x, index, attr, batch))
    with pytest.raises(ValueError, match="two members"):
        GraphEnsemble([VesselGcn(4, 1)])
