import itertools

import pytest

from aneurysm.physics.curriculum import Curriculum


def test_mass_first_momentum_later_and_blood_thins():
    curriculum = Curriculum(
        momentum_start=0.2, momentum_ramp=0.4, reynolds_start=10.0, reynolds_end=160.0, reynolds_ramp=0.5
    )
    start, middle, end = (curriculum.at(p) for p in (0.0, 0.4, 1.0))
    assert (start.continuity, start.flux, start.slip, start.momentum, start.reynolds_cap) == (1, 1, 1, 0, 10)
    assert middle.momentum == pytest.approx(0.5)
    assert curriculum.at(0.25).reynolds_cap == pytest.approx(40)
    assert (end.momentum, end.reynolds_cap) == (1, pytest.approx(160))


def test_weights_scale_their_own_term_and_no_other():
    names = ("continuity", "flux", "momentum", "slip")
    for name in names:
        weights = Curriculum(**{f"{name}_weight": 7.0}).at(1.0)
        assert [getattr(weights, other) for other in names] == [
            7.0 if other == name else 1.0 for other in names
        ]


def test_progress_is_clipped_and_weights_never_fall():
    curriculum = Curriculum()
    assert curriculum.at(-1.0) == curriculum.at(0.0) and curriculum.at(7.0) == curriculum.at(1.0)
    steps = [curriculum.at(i / 50) for i in range(51)]
    for a, b in itertools.pairwise(steps):
        assert b.momentum >= a.momentum and b.reynolds_cap >= a.reynolds_cap


def test_without_ramps_everything_counts_at_once():
    weights = Curriculum(momentum_start=0.0, momentum_ramp=0.0, reynolds_ramp=0.0).at(0.0)
    assert weights.momentum == 1 and weights.reynolds_cap == 130


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"momentum_start": 1.5}, "fraction"),
        ({"reynolds_start": 0.0}, "positive"),
        ({"flux_weight": -1.0}, "negative"),
        ({"slip_weight": -1.0}, "negative"),
    ],
)
def test_refuses_impossible_schedules(knob, words):
    with pytest.raises(ValueError, match=words):
        Curriculum(**knob)
