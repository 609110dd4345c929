import pytest
import torch

from aneurysm.physics.collocation import R3Population, hard_point_mean, retain_top


def test_retain_top_keeps_the_largest_of_every_row():
    residual = torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0], [9.0, 0.0, 8.0, 1.0, 7.0]])
    kept = retain_top(residual, 0.4)
    assert kept.tolist() == [[1, 3], [0, 2]]
    assert retain_top(residual, 0.01).shape == (2, 1)
    with pytest.raises(ValueError, match="fraction"):
        retain_top(residual, 0.0)


def test_hard_point_mean_lies_between_the_mean_and_the_hard_mean():
    residual = torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    assert hard_point_mean(residual, 0.25, 0.0).item() == 1.0
    assert hard_point_mean(residual, 0.25, 0.5).item() == 2.5
    assert hard_point_mean(residual, 0.25, 1.0).item() == 4.0


def test_population_retains_resamples_and_releases():
    population = R3Population(batch=2, pool=1000, points=50, retain=0.2, every=3, seed=1)
    first = population.indices
    residual = torch.arange(50.0).repeat(2, 1)
    population.update(residual)
    population.update(residual)
    assert torch.equal(population.indices, first) and population.retained == 0
    population.update(residual)
    assert population.retained == 10
    assert torch.equal(population.indices[:, :10], first[:, 40:].flip(1))  # the hardest, hardest first
    assert not torch.equal(population.indices[:, 10:], first[:, :40])
    held = set(population.indices[0, :10].tolist())
    for _ in range(3):
        population.update(-residual)  # the retained points have become the hardest again, then the easiest
    assert set(population.indices[0, :10].tolist()) == held
    for _ in range(3):
        population.update(residual)
    assert not held & set(population.indices[0, :10].tolist())


def test_population_refuses_to_keep_everything():
    with pytest.raises(ValueError, match="retain"):
        R3Population(1, 10, 5, retain=1.0)
    with pytest.raises(ValueError, match="every"):
        R3Population(1, 10, 5, every=0)


def test_population_goes_on_from_a_saved_state():
    residuals = torch.rand(30, 2, 16, generator=torch.Generator().manual_seed(3))

    def population() -> R3Population:
        return R3Population(batch=2, pool=100, points=16, every=4, seed=5)

    whole, first, second = population(), population(), population()
    for residual in residuals:
        whole.update(residual)
    for residual in residuals[:13]:
        first.update(residual)
    second.load_state_dict(first.state_dict())
    first.update(residuals[0])  # what goes on elsewhere does not reach into the state
    for residual in residuals[13:]:
        second.update(residual)
    assert torch.equal(second.indices, whole.indices)
    assert (second.retained, second.steps) == (whole.retained, whole.steps)
    with pytest.raises(ValueError, match="this population has"):
        R3Population(batch=3, pool=100, points=16).load_state_dict(whole.state_dict())
