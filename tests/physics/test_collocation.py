import pytest
import torch
from torch import Tensor

from aneurysm.physics.collocation import (
    FixedPoints,
    R3PaperPopulation,
    R3Population,
    ResidualWeighted,
    UniformPoints,
    hard_point_mean,
    population,
    retain_top,
)
from aneurysm.physics.collocation_population import Population, Quotas

KINDS = ["uniform", "fixed", "r3", "r3_paper", "residual_weighted"]


def hard_corner(indices: Tensor, pool: int) -> Tensor:
    """A squared residual that grows steeply towards the end of the pool."""
    return (indices.double() / pool) ** 8


def quotas(batch: int, pool: int) -> Quotas:
    """The wall is the first quarter of the pool and the dome its last tenth."""
    place = torch.arange(pool).expand(batch, -1)
    return Quotas(near_wall=place < pool // 4, near_dome=place >= pool - pool // 10)


def follow(points: Population, steps: int) -> Population:
    for _ in range(steps):
        points.update(hard_corner(points.indices, points.pool))
    return points


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


def test_uniform_points_are_drawn_anew_at_every_step_and_fixed_ones_never():
    uniform, fixed = UniformPoints(2, 1000, 50, seed=1), FixedPoints(2, 1000, 50, seed=1)
    first = uniform.indices
    assert torch.equal(fixed.indices, first)
    drawn = [follow(uniform, 1).indices for _ in range(3)]
    assert all((a == b).double().mean() < 0.1 for a, b in zip([first, *drawn], drawn, strict=False))
    assert torch.equal(follow(fixed, 3).indices, first) and fixed.steps == 3
    assert uniform.retained == 0 and uniform.fresh.all() and uniform.weights is None


def test_r3_retains_resamples_and_releases():
    points = R3Population(batch=2, pool=100_000, points=50, retain=0.2, every=3, seed=1)
    first = points.indices
    residual = torch.arange(50.0).repeat(2, 1)
    points.update(residual)
    points.update(residual)
    assert torch.equal(points.indices, first) and points.retained == 0
    points.update(residual)
    assert points.retained == 10 and points.fresh.sum(1).tolist() == [40, 40]
    assert torch.equal(points.indices[:, :10], first[:, 40:].flip(1))  # the hardest, hardest first
    assert not torch.isin(points.indices[:, 10:], first[:, :40]).any()
    held = points.indices[:, :10]
    for _ in range(3):
        points.update(-residual)  # the retained points are the hardest again, then the easiest
    assert torch.equal(points.indices[:, :10], held)
    for _ in range(3):
        points.update(residual)
    assert not torch.isin(points.indices, held).any()


def test_r3_resamples_at_least_one_point():
    points = R3Population(batch=1, pool=10, points=5, retain=0.99, every=1)
    assert follow(points, 2).retained == 4
    assert follow(R3Population(batch=1, pool=10, points=1, every=1), 2).retained == 0


def test_r3_of_the_paper_keeps_what_exceeds_the_mean_of_its_own_candidate():
    points = R3PaperPopulation(batch=3, pool=100_000, points=6, seed=2)
    first = points.indices
    size = torch.tensor([[0.0, 9, 0, 0, 3, 0], [1, 5, 4, 4, 5, 5], [2, 2, 2, 2, 2, 2]])  # |r|, means 2, 4, 2
    points.update(size**2)
    assert points.fresh.sum(1).tolist() == [4, 3, 6] and points.retained == 3
    assert torch.equal(points.indices[0, :2], first[0, [1, 4]])
    assert torch.equal(points.indices[1, :3], first[1, [1, 4, 5]])
    assert not torch.isin(points.indices[points.fresh], first).any()


def test_r3_of_the_paper_never_runs_out_of_fresh_points():
    points = R3PaperPopulation(batch=1, pool=50, points=3)
    # The floating-point mean of three such numbers lies below each of them.
    alike = next(x for x in torch.rand(1000, dtype=torch.float64) if x.repeat(1, 3).sqrt().mean(1) < x.sqrt())
    points.update(alike.repeat(1, 3))
    assert points.retained == 0
    points.update(torch.full((1, 3), torch.nan))
    assert points.retained == 0


def test_residual_weighted_draws_half_by_residual_and_half_uniformly():
    pool, every = 40, 10
    points = ResidualWeighted(batch=1, pool=pool, points=20_000, every=every, seed=3)
    size = torch.linspace(0, 2, pool, dtype=torch.float64)  # |r|, all points are seen at once
    for _ in range(every):
        points.update(size[points.indices] ** 2)
    assert points.retained == 10_000
    count = torch.bincount(points.indices[0], minlength=pool)
    expected = (size / size.mean() + 1) / 2 * 20_000 / pool  # Wu et al., eq. 2 with k = c = 1
    assert ((count - expected) ** 2 / expected).sum() < pool + 6 * (2 * pool) ** 0.5


def test_residual_weighted_counts_unseen_points_as_the_mean_of_seen_ones():
    points = ResidualWeighted(batch=1, pool=10, points=4, every=1)
    points.indices = torch.tensor([[0, 1, 2, 3]])
    points.update(torch.tensor([[0.0, 1.0, 4.0, torch.nan]]))  # |r| 0, 1, 2 and a flow that diverged
    assert points.seen[0, :3].tolist() == [0, 1, 2] and points.seen[0, 3:].isnan().all()
    many = ResidualWeighted(batch=1, pool=10, points=20_000, every=1, power=2.0, seed=1)
    many.seen = points.seen
    many.indices = torch.zeros_like(many.indices)
    many.update(torch.zeros(1, 20_000))
    led = torch.bincount(many.indices[0, : many.retained], minlength=10) / many.retained
    weight = torch.tensor([0.0, 1.0, 4.0] + 7 * [5 / 3])  # |r|^2, and the mean of the squares of those seen
    torch.testing.assert_close(led, weight / weight.sum(), rtol=0, atol=0.015)


def test_residual_weighted_is_uniform_where_nothing_is_left():
    points = ResidualWeighted(batch=2, pool=10, points=2000, every=1)
    points.update(torch.zeros(2, 2000))
    assert torch.bincount(points.indices[0, : points.retained], minlength=10).min() > 50
    points = ResidualWeighted(batch=2, pool=10, points=2000, every=1)
    points.update(torch.full((2, 2000), torch.inf))
    assert torch.bincount(points.indices[0, : points.retained], minlength=10).min() > 50


@pytest.mark.parametrize("kind", ["uniform", "fixed", "residual_weighted"])
def test_weights_make_the_mean_that_of_the_pool(kind):
    batch, pool = 4000, 30
    points = population(
        kind, batch, pool, 25, every=1, seed=4, quotas=quotas(batch, pool), unbiased=True, floor=0.5
    )
    follow(points, 4)
    value = torch.linspace(-1, 3, pool, dtype=torch.float64).exp()
    assert points.weights is not None
    found = (points.weights * value[points.indices]).mean(1)  # (b,), one draw per candidate
    error = found.std() / batch**0.5
    assert abs(found.mean() - value.mean()) < 4 * error
    assert abs(value[points.indices].mean() - value.mean()) > 20 * error  # which the plain mean is not
    assert points.weights.max() <= points.points / (points.points - points.retained)


def test_retained_points_have_no_weights():
    for kind in ("r3", "r3_paper"):
        with pytest.raises(ValueError, match="no weights"):
            population(kind, 1, 10, 5, unbiased=True)


@pytest.mark.parametrize("kind", KINDS)
def test_quotas_take_their_share_of_the_fresh_draws(kind):
    pool, n = 200, 100
    points = follow(population(kind, 3, pool, n, every=1, seed=5, quotas=quotas(3, pool)), 3)
    size = hard_corner(points.indices, pool).sqrt()
    above = (size > size.mean(1, keepdim=True)).sum(1).tolist()
    leads = {"r3": [30] * 3, "r3_paper": above, "residual_weighted": [50] * 3}.get(kind, [0] * 3)
    follow(points, 1)
    for row, lead, start in zip(points.indices, leads, points.starts.tolist(), strict=True):
        share = (n - lead) // 5
        assert start == lead + 2 * share and share >= 5
        wall, dome, uniform = row[lead : lead + share], row[lead + share : start], row[start:]
        assert (wall < pool // 4).all() and (dome >= pool - pool // 10).all()
        assert (uniform >= pool // 4).any() and (uniform < pool - pool // 10).any()


def test_a_candidate_without_a_dome_draws_that_quota_from_its_whole_pool():
    dome = torch.zeros(2, 100, dtype=torch.bool)
    dome[1, 7] = True
    points = UniformPoints(2, 100, 50, quotas=Quotas(near_dome=dome, dome_share=0.5))
    assert points.retained == 25
    assert len(points.indices[0, :25].unique()) > 10 and (points.indices[1, :25] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_quotas", [False, True])
def test_uniform_columns_are_uniform(kind, with_quotas):
    """Chi-square over a hundred refreshes, in which the other columns follow a steep residual."""
    batch, pool = 4, 25
    strata = quotas(batch, pool) if with_quotas else None
    count = torch.zeros(pool)
    for seed in range(10):
        points = population(kind, batch, pool, 60, every=1, seed=(6, seed), quotas=strata)
        for _ in range(1 if kind == "fixed" else 10):
            follow(points, 1)
            count += torch.bincount(points.indices[:, points.retained :].flatten(), minlength=pool)
    expected = count.sum() / pool
    assert expected > 40
    assert ((count - expected) ** 2 / expected).sum() < pool + 6 * (2 * pool) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_draws_depend_on_the_seed_and_the_step_alone(kind):
    def after(steps: int, seed: int | tuple[int, ...], by: float) -> Population:
        points = population(kind, 2, 10_000, 40, every=2, seed=seed)
        for _ in range(steps):
            points.update(by * points.indices.double())
        return points

    one, other = after(6, (7, 1), 1.0), after(6, (7, 1), 2.0)
    assert torch.equal(one.indices, other.indices)
    assert not torch.equal(one.indices, after(6, (7, 2), 1.0).indices)
    key = after(0, (7, 1), 1.0) if kind == "fixed" else UniformPoints(2, 10_000, 40, seed=(7, 1))
    if kind != "fixed":
        follow(key, 6)  # the same numbers, whatever is retained or drawn beside them
    assert torch.equal(one.indices[one.fresh], key.indices[one.fresh])


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_a_saved_state(kind, tmp_path):
    residuals = torch.rand(30, 2, 16, generator=torch.Generator().manual_seed(3))
    unbiased = kind in ("uniform", "fixed", "residual_weighted")

    def made(batch: int = 2, pool: int = 100) -> Population:
        return population(
            kind, batch, pool, 16, every=4, seed=5, quotas=quotas(batch, pool), unbiased=unbiased
        )

    whole, first, second = made(), made(), made()
    for residual in residuals:
        whole.update(residual)
    for residual in residuals[:13]:
        first.update(residual)
    state = first.state_dict()
    for residual in residuals[:4]:
        first.update(residual)  # what goes on elsewhere does not reach into the state
    torch.save(state, tmp_path / "population.pt")
    second.load_state_dict(torch.load(tmp_path / "population.pt", weights_only=True))
    for residual in residuals[13:]:
        second.update(residual)
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert ours[name] == value
    assert second.retained == whole.retained
    for foreign in (made(batch=3), made(pool=99), population("r3" if kind != "r3" else "fixed", 2, 100, 16)):
        with pytest.raises(ValueError, match="this population has"):
            foreign.load_state_dict(whole.state_dict())


def test_population_makes_every_kind_at_its_own_pace():
    made = {kind: population(kind, 2, 30, 10, retain=0.4, power=2.0, floor=3.0) for kind in KINDS}
    assert [type(points) for points in made.values()] == [
        UniformPoints,
        FixedPoints,
        R3Population,
        R3PaperPopulation,
        ResidualWeighted,
    ]
    assert [points.every for points in made.values()] == [1, 1, 100, 1, 100]
    r3, weighted = made["r3"], made["residual_weighted"]
    assert isinstance(r3, R3Population) and r3.retain == 0.4
    assert isinstance(weighted, ResidualWeighted) and (weighted.power, weighted.floor) == (2.0, 3.0)
    with pytest.raises(ValueError, match=r"'sobol'; choose one of uniform, fixed, r3, r3_paper, residual_w"):
        population("sobol", 2, 30, 10)


def test_refuses_what_leaves_no_honest_points():
    for retain in (0.0, 1.0):
        with pytest.raises(ValueError, match="retain must lie"):
            R3Population(1, 10, 5, retain=retain)
    with pytest.raises(ValueError, match="floor"):
        ResidualWeighted(1, 10, 5, floor=0.0)
    with pytest.raises(ValueError, match="power"):
        ResidualWeighted(1, 10, 5, power=-1.0)
    for wall, dome in ((0.6, 0.4), (-0.1, 0.2)):
        with pytest.raises(ValueError, match="leave some to the whole pool"):
            Quotas(wall_share=wall, dome_share=dome)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="every=0"):
        R3Population(1, 10, 5, every=0)
    with pytest.raises(ValueError, match="points=0"):
        UniformPoints(1, 10, 0)
    with pytest.raises(ValueError, match=r"near_wall .* \(2, 30\), got \(1, 30\)"):
        UniformPoints(2, 30, 5, quotas=quotas(1, 30))
    with pytest.raises(ValueError, match=r"\(2, 5\) .* \(2, 4\)"):
        FixedPoints(2, 30, 5).update(torch.zeros(2, 4))
