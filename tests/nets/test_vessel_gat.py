import numpy as np
import pytest
import torch
from torch_geometric.nn import GATv2Conv

from aneurysm.nets.vessel_gat import VesselGat, VesselGcn, VesselMlp

NETS = (VesselGat, VesselGcn, VesselMlp)


def chain(nodes: int, features: int = 5, edge_features: int = 3, seed: int = 0):
    """A path graph with both directions of every edge."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, features, generator=rng)
    one = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    attr = torch.randn(nodes - 1, edge_features, generator=rng)
    return (
        x,
        torch.cat([one, one.flip(0)], dim=1),
        torch.cat([attr, attr]),
        torch.zeros(nodes, dtype=torch.long),
    )


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layers", [0, 2])
def test_one_logit_per_node_and_gradients_everywhere(net, residual: bool, layers: int):
    torch.manual_seed(0)
    model = net(5, 3, hidden=8, layers=layers, heads=2, residual=residual)
    logits = model(*chain(11))
    assert logits.shape == (11,)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("net", NETS)
def test_graphs_without_nodes_or_edges(net):
    model = net(5, 3)
    none = torch.zeros(2, 0, dtype=torch.long)
    empty = model(torch.zeros(0, 5), none, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)
    empty.sum().backward()
    lonely = model(torch.randn(1, 5), none, torch.zeros(0, 3), torch.zeros(1, dtype=torch.long))
    assert lonely.shape == (1,) and torch.isfinite(lonely).all()


def test_graphs_of_a_batch_do_not_see_each_other():
    model = VesselGat(5, 3, hidden=8, heads=2).eval()
    a, b = chain(6, seed=1), chain(9, seed=2)
    both = model(
        torch.cat([a[0], b[0]]),
        torch.cat([a[1], b[1] + 6], dim=1),
        torch.cat([a[2], b[2]]),
        torch.cat([a[3], b[3] + 1]),
    )
    torch.testing.assert_close(both, torch.cat([model(*a), model(*b)]), atol=1e-5, rtol=1e-5)


def test_a_batch_with_an_empty_last_graph():
    model = VesselGat(5, 3, hidden=8, heads=2).eval()
    a, b = chain(6, seed=1), chain(5, seed=2)
    batch = torch.cat([a[3], b[3] + 2])  # graph 1 has no node, and neither has a graph 3
    x, index, attr = torch.cat([a[0], b[0]]), torch.cat([a[1], b[1] + 6], dim=1), torch.cat([a[2], b[2]])
    torch.testing.assert_close(model(x, index, attr, batch)[:6], model(*a), atol=1e-5, rtol=1e-5)


def test_attention_sees_neighbours_and_the_ablation_does_not():
    x, index, attr, batch = chain(12)
    moved = x.clone()
    moved[0] += 3.0
    torch.manual_seed(0)
    gat, mlp = VesselGat(5, 3, hidden=8, heads=2, layers=2).eval(), VesselMlp(5, 3, hidden=8, layers=2).eval()
    assert not torch.allclose(gat(x, index, attr, batch)[1], gat(moved, index, attr, batch)[1])
    torch.testing.assert_close(mlp(x, index, attr, batch)[1:], mlp(moved, index, attr, batch)[1:])


@pytest.mark.parametrize("net", NETS)
def test_calibration_makes_the_scale_of_features_irrelevant(net):
    x, index, attr, batch = chain(40)
    units = torch.tensor([1.0, 1e3, 1e-2, 5.0, 1.0])
    outputs = []
    for scale in (torch.ones(5), units):
        torch.manual_seed(0)
        model = net(5, 3, hidden=8, heads=2).eval()
        model.calibrate(x * scale + 7 * scale, attr)
        outputs.append(model(x * scale + 7 * scale, index, attr, batch))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)
    again = net(5, 3, hidden=8, heads=2)
    again.load_state_dict(model.state_dict())  # the scaling travels with the weights
    torch.testing.assert_close(again.node_scale.mean, model.node_scale.mean)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        VesselGat(5, 3, hidden=10, heads=4)
    with pytest.raises(ValueError, match="columns to calibrate"):
        VesselGat(5, 3).calibrate(torch.zeros(4, 6))


def test_the_attention_layer_equals_the_published_formula(golden):
    """e_ij = a . LeakyReLU(W_l x_j + W_r x_i + W_e e_ij), softmax over the neighbours j of i."""
    path = golden / "gatv2_concat_selfloop.npz"
    with np.load(path) as file:
        x, index, attr = (torch.tensor(file[k]) for k in ("x", "edge_index", "edge_attr"))
        loops = torch.tensor(file["edge_index_out"])
    torch.manual_seed(0)
    layer = GATv2Conv(5, 4, heads=2, edge_dim=3).double()
    with torch.no_grad():
        layer.bias.normal_()
    out, (edges, alpha) = layer(x, index, attr, return_attention_weights=True)
    torch.testing.assert_close(edges, loops)
    expected = torch.zeros(12, 2, 4, dtype=torch.double)
    left, right = (linear(x).view(12, 2, 4) for linear in (layer.lin_l, layer.lin_r))
    for i in range(12):
        incoming = [k for k in range(index.shape[1]) if index[1, k] == i]
        own = attr[incoming].mean(0) if incoming else torch.zeros(3, dtype=torch.double)
        sources = [int(index[0, k]) for k in incoming] + [i]
        along = torch.stack([*(attr[k] for k in incoming), own])
        mixed = left[sources] + right[i] + layer.lin_edge(along).view(-1, 2, 4)
        energy = (torch.nn.functional.leaky_relu(mixed, 0.2) * layer.att).sum(-1)
        expected[i] = (energy.softmax(0)[..., None] * left[sources]).sum(0)
    torch.testing.assert_close(out, expected.flatten(1) + layer.bias, atol=1e-10, rtol=1e-10)
    assert alpha.shape == (loops.shape[1], 2)


def test_graph_norm_takes_every_graph_by_itself():
    """Per graph the features come out with mean 0 and spread 1 before anything is trained."""
    model = VesselGat(5, 3, hidden=8, heads=2, norm="graph").eval()
    a, b = chain(6, seed=1), chain(9, seed=2)
    both = (
        torch.cat([a[0], 50 + 3 * b[0]]),
        torch.cat([a[1], b[1] + 6], dim=1),
        torch.cat([a[2], b[2]]),
        torch.cat([a[3], b[3] + 1]),
    )
    normed = model.norms[0](model.embed(model.node_scale(both[0])), both[3])
    for graph in (normed[:6], normed[6:]):
        torch.testing.assert_close(graph.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    joined = model(*both)
    torch.testing.assert_close(joined[:6], model(*a), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="layer, graph"):
        VesselGat(5, 3, norm="batch")


def test_the_plain_convolution_sees_neighbours_but_no_edge_features():
    model = VesselGcn(5, 3, hidden=8, layers=2).eval()
    x, index, attr, batch = chain(9)
    before = model(x, index, attr, batch)
    torch.testing.assert_close(model(x, index, attr + 1, batch), before)
    moved = x.clone()
    moved[4] += 1
    alone = VesselMlp(5, 3, hidden=8, layers=2).eval()
    assert (model(moved, index, attr, batch) - before)[3].abs() > 1e-6
    torch.testing.assert_close(alone(moved, index, attr, batch)[3], alone(x, index, attr, batch)[3])


def test_edges_are_scaled_too():
    model = VesselGat(5, 3, hidden=8, heads=2)
    x, _, attr, _ = chain(9)
    model.calibrate(x, 100 * attr + 7)
    torch.testing.assert_close(model.edge_scale.mean, (100 * attr + 7).mean(0))
    model.calibrate(x, attr[:0])  # graphs of single nodes: nothing to measure
    torch.testing.assert_close(model.edge_scale.mean, (100 * attr + 7).mean(0))
