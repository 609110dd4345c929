import numpy as np
import pytest
import torch

from aneurysm.physics.collocation import R3Population
from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.flow_points import collate_flow, no_flow
from aneurysm.physics.head import PhysicsHead


@pytest.fixture
def batch(tube):
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
    assert out.loss.requires_grad and not out.features.requires_grad and not out.residual_log10.requires_grad
    out.loss.sum().backward()
    assert torch.isfinite(latent.grad).all() and not latent.grad[1].any()
    assert (latent.grad[out.valid].norm(dim=1) > 0).all()


def test_a_batch_without_flow_is_zero_and_still_trains(head):
    latent = torch.full((2, 6), float("nan"), requires_grad=True)
    out = head(latent, collate_flow([no_flow(), no_flow()]))
    assert not out.valid.any() and not out.loss.any() and not out.features.any()
    out.loss.sum().backward()
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
        (1e4 * head(latent, batch).loss).sum().backward()
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
        assert torch.equal(head(latent, batch).loss, reference)
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


def test_a_persistent_population_is_used_and_updated(tube):
    flow = collate_flow([tube().sample(0), tube(radius=3.0).sample(1)])
    head = PhysicsHead(latent_dim=6, width=16, points=64).train()
    population = R3Population(batch=2, pool=256, points=80, retain=0.25, every=2)
    latent = torch.randn(2, 6)
    first = head(latent, flow, population=population)
    head(latent, flow, population=population)
    retained = head(latent, flow, population=population)
    assert population.retained == 20
    assert (retained.loss > first.loss).all()  # same network, harder points
    with pytest.raises(ValueError, match="256 points"):
        head(latent, collate_flow([tube().sample(0, n_points=50)] * 2), population=population)


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
    for knob in ({"latent_dim": 1}, {"points": 0}, {"rho": 0.0}, {"retain_share": 2.0}):
        with pytest.raises(ValueError):
            PhysicsHead(**knob)
    with pytest.raises(ValueError, match="negative"):
        Curriculum(momentum_weight=-1.0)
