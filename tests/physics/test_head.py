"""The head on batches of candidates: what it reports, what it trains, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.flow_points import FlowPoints, collate_flow, no_flow
from aneurysm.physics.head import PhysicsHead


@pytest.fixture(scope="module")
def batch(tube) -> FlowPoints:
    return collate_flow(
        [
            tube().sample(0),
            no_flow(),
            tube(radius=3.0).sample(1),
            tube(shape=(40, 47, 29), sac=(1.0, 1.7)).sample(2),
        ]
    )


@pytest.fixture
def head() -> PhysicsHead:
    torch.manual_seed(0)
    return PhysicsHead(latent_dim=6, width=16, points=64).eval()


def test_output_shapes_types_and_masking(head, batch):
    latent = torch.randn(4, 6, requires_grad=True)
    out = head(latent, batch)
    assert out.loss.shape == out.residual_log10.shape == out.coherence.shape == (4,)
    assert out.features.shape == (4, head.feature_count) and len(head.FEATURES) == head.feature_count
    assert out.loss.dtype == out.features.dtype == torch.float32
    assert out.valid.tolist() == [True, False, True, True]
    assert out.loss[1] == 0 and not out.features[1].any() and (out.loss[out.valid] > 0).all()
    for reported in (out.loss, out.features, out.residual_log10, out.coherence):
        assert not reported.requires_grad
    assert out.driven.tolist() == [False] * 4
    out.total.backward()
    assert torch.isfinite(latent.grad).all() and not latent.grad[1].any()
    assert (latent.grad[out.valid].norm(dim=1) > 0).all()


def test_what_is_minimised_is_the_sum_of_the_logarithms(head, batch):
    out = head(torch.randn(4, 6), batch)
    torch.testing.assert_close(out.total, torch.log1p(out.loss[out.valid]).sum(), rtol=1e-6, atol=0)
    assert out.total.dtype == torch.float32 and out.total.requires_grad


def test_a_batch_without_flow_is_zero_and_still_trains(head):
    latent = torch.full((2, 6), float("nan"), requires_grad=True)
    out = head(latent, collate_flow([no_flow(), no_flow()]))
    assert not out.valid.any() and not out.loss.any() and not out.features.any() and out.total == 0
    out.total.backward()
    assert all(not p.grad.any() for p in head.parameters())


def test_a_broken_invalid_row_does_not_touch_the_others(head, batch):
    latent = torch.randn(4, 6)
    broken = latent.clone()
    broken[1] = float("nan")
    torch.testing.assert_close(head(broken, batch).loss, head(latent, batch).loss, rtol=0, atol=0)


def test_candidates_do_not_influence_each_other(head, batch):
    latent = torch.randn(4, 6)
    together = head(latent, batch)
    for row in (0, 2, 3):
        alone = head(latent[row : row + 1], batch.rows(torch.tensor([row])))
        torch.testing.assert_close(alone.loss[0], together.loss[row], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(alone.features[0], together.features[row], rtol=1e-5, atol=1e-6)


def test_training_draws_points_and_evaluation_does_not(head, batch):
    latent = torch.randn(4, 6)
    assert torch.equal(head(latent, batch).loss, head(latent, batch).loss)
    head.train()
    assert not torch.equal(head(latent, batch).loss, head(latent, batch).loss)


def test_hard_points_raise_the_training_loss_but_not_the_reported_residual(batch):
    torch.manual_seed(0)
    uniform = PhysicsHead(latent_dim=6, width=16, points=256, retain_share=0.0).train()
    hard = PhysicsHead(latent_dim=6, width=16, points=256, retain_share=0.5).train()
    hard.load_state_dict(uniform.state_dict())
    latent = torch.randn(4, 6)
    a, b = uniform(latent, batch), hard(latent, batch)
    assert (b.loss[b.valid] > 1.2 * a.loss[a.valid]).all()
    torch.testing.assert_close(a.residual_log10, b.residual_log10, rtol=1e-6, atol=1e-6)


def test_gradient_into_the_encoder_is_bounded(batch):
    for bound in (0.0, 1e-3, 0.1):
        torch.manual_seed(0)
        head = PhysicsHead(latent_dim=6, width=16, points=64, max_latent_gradient=bound)
        latent = torch.randn(4, 6, requires_grad=True)
        (1e4 * head(latent, batch).total).backward()
        norms = latent.grad.norm(dim=1)[[0, 2, 3]].double()
        np.testing.assert_allclose(norms, bound, rtol=1e-5, atol=1e-12)


def test_curriculum_starts_with_mass_and_flux(head, batch):
    latent = torch.randn(4, 6)
    early, late = head(latent, batch, progress=0.0), head(latent, batch, progress=1.0)
    mass = 10.0 ** early.features[:, 0] + early.features[:, -1] ** 2
    torch.testing.assert_close(early.loss[early.valid], mass[early.valid], rtol=1e-4, atol=1e-6)
    assert (late.loss[late.valid] > early.loss[late.valid]).all()


def test_runs_without_gradient_and_under_autocast(head, batch):
    latent = torch.randn(4, 6)
    reference = head(latent, batch).loss
    with torch.inference_mode():
        quiet = head(latent, batch)
    assert torch.equal(quiet.loss, reference) and not quiet.total.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(latent, batch).loss, reference)
    assert torch.isfinite(head(latent.bfloat16(), batch).loss).all()


def test_single_precision_is_close(batch):
    torch.manual_seed(0)
    double = PhysicsHead(latent_dim=6, width=16, points=64).eval()
    single = PhysicsHead(latent_dim=6, width=16, points=64, dtype="float32").eval()
    single.load_state_dict(double.state_dict())
    latent = torch.randn(4, 6)
    torch.testing.assert_close(single(latent, batch).loss, double(latent, batch).loss, rtol=1e-3, atol=1e-4)


def keyed(tube) -> FlowPoints:
    """Two candidates that are known when they come again, and one that is not."""
    flow = collate_flow([tube().sample(0), tube(radius=3.0).sample(1), tube().sample(2)])
    return replace(flow, key=torch.tensor([11, 12, 0]))


def r3_head(**changes: float) -> PhysicsHead:
    torch.manual_seed(0)
    knobs = {"collocation": "r3", "points": 80, "retain_fraction": 0.25, "every": 2} | changes
    return PhysicsHead(latent_dim=6, width=16, **knobs).train()


def test_kept_points_come_again_until_they_are_old(tube):
    flow, latent, head = keyed(tube), torch.randn(3, 6), r3_head()
    assert head.hard_points is not None
    first = head(latent, flow)
    kept = {key: indices.clone() for key, (_, indices) in head.hard_points.kept.items()}
    assert set(kept) == {11, 12} and all(len(indices) == 20 for indices in kept.values())
    again = head(latent[[1, 0]], flow.rows(torch.tensor([1, 0])))
    # The same network on harder points; what is reported is measured on the others.
    assert (again.loss > 1.05 * first.loss[[1, 0]]).all()
    torch.testing.assert_close(again.residual_log10, first.residual_log10[[1, 0]], rtol=0, atol=0.15)
    chosen, uniform = head._choose(flow, torch.arange(3), 3)
    assert uniform == 20 and chosen.shape == (3, 80)
    for row, key in enumerate((11, 12)):
        assert torch.equal(chosen[row, :20], kept[key])  # two steps later they are chosen anew
    assert head.hard_points.kept[11][0] == 1
    head(latent, flow)
    assert head.hard_points.kept[11][0] == 3


def test_evaluation_keeps_and_recalls_nothing(tube):
    flow, latent, head = keyed(tube), torch.randn(3, 6), r3_head()
    plain = PhysicsHead(latent_dim=6, width=16, points=80).eval()
    plain.load_state_dict(head.state_dict(), strict=False)
    head(latent, flow)
    before = int(head.steps)
    assert torch.equal(head.eval()(latent, flow).loss, plain(latent, flow).loss)
    assert int(head.steps) == before == 1


def test_kept_points_survive_a_checkpoint(tube, tmp_path):
    flow, latent, head = keyed(tube), torch.randn(3, 6), r3_head()
    head(latent, flow)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    copy = r3_head()
    copy.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    losses = []
    for one in (head, copy):
        torch.manual_seed(1)
        losses.append(one(latent, flow).loss)
    assert torch.equal(*losses)


def test_shares_of_points_near_the_wall_and_the_candidate(tube):
    flow = tube(shape=(40, 47, 29), sac=(1.3, 2.04)).sample(0)
    shares = {"near_wall_share": 0.25, "near_candidate_share": 0.2}
    torch.manual_seed(0)
    head = PhysicsHead(latent_dim=6, width=16, points=40, collocation="uniform", **shares).train()
    chosen, uniform = head._choose(flow, torch.arange(1), 1)
    assert uniform == 18 and chosen.shape == (1, 40)
    assert flow.near_wall[0, chosen[0, :10]].all() and flow.near_candidate[0, chosen[0, 10:18]].all()
    for part in (slice(0, 10), slice(10, 18), slice(18, 40)):
        assert len(chosen[0, part].unique()) == part.stop - part.start


@pytest.mark.parametrize("quietly", [torch.no_grad, torch.inference_mode])
def test_refining_fits_a_copy_to_every_vessel(batch, quietly):
    torch.manual_seed(0)
    head = PhysicsHead(latent_dim=6, width=16, points=64, refine_steps=30).eval()
    before, latent = [p.clone() for p in head.parameters()], torch.randn(4, 6)
    rough = head(latent, batch)
    with quietly():
        fine = head.refine(latent, batch)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(head.parameters(), before, strict=True))
    assert (fine.loss[fine.valid] < 0.3 * rough.loss[fine.valid]).all() and fine.total == 0
    assert (fine.residual_log10[fine.valid] < rough.residual_log10[fine.valid] - 0.5).all()
    assert fine.loss[1] == 0 and not fine.features[1].any() and torch.equal(fine.valid, batch.valid)
    alone = head.refine(latent[2:3], batch.rows(torch.tensor([2])))
    torch.testing.assert_close(alone.features[0], fine.features[2], rtol=1e-4, atol=1e-5)


def test_saves_and_loads(head, batch, tmp_path):
    torch.save(head.state_dict(), tmp_path / "head.pt")
    copy = PhysicsHead(latent_dim=6, width=16, points=64).eval()
    copy.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    latent = torch.randn(4, 6)
    assert torch.equal(copy(latent, batch).loss, head(latent, batch).loss)


def test_refuses_what_does_not_fit(head, batch):
    with pytest.raises(ValueError, match="latents"):
        head(torch.randn(4, 5), batch)
    with pytest.raises(ValueError, match="flow rows"):
        head(torch.randn(3, 6), batch)
    for knob in (
        {"latent_dim": 1},
        {"points": 0},
        {"rho": 0.0},
        {"retain_share": 2.0},
        {"collocation": "worst"},
        {"near_wall_share": 0.6, "near_candidate_share": 0.5},
        {"refine_steps": -1},
        {"wall": "rubber"},
    ):
        with pytest.raises(ValueError):
            PhysicsHead(**knob)
    with pytest.raises(ValueError, match="negative"):
        Curriculum(momentum_weight=-1.0)
