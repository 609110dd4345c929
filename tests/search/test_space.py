"""A search space is what Hydra's sweep syntax says."""

import optuna
import pytest

from aneurysm.data.errors import UserError
from aneurysm.search.space import Choice, Number, parse_space


def only(text: str) -> Choice | Number:
    fixed, space = parse_space([text])
    assert not fixed and len(space) == 1
    return space[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oscillator_dim=2,4,8", Choice("oscillator_dim", ("2", "4", "8"))),
        ("fusion=choice(early,mean)", Choice("fusion", ("early", "mean"))),
        ("vessel.flips=choice([],[w])", Choice("vessel.flips", ("[]", "[w]"))),
        ("segmenter@vessel.net=unet,segformer3d", Choice("segmenter@vessel.net", ("unet", "segformer3d"))),
        ("balance.temperature=range(5,50,5)", Number("balance.temperature", 5, 45, True, 5)),
        ("expert.dropout=range(0.0,0.6,0.2)", Number("expert.dropout", 0.0, 0.4, False, 0.2)),
        ("expert.lr=tag(log,interval(1e-4,1e-2))", Number("expert.lr", 1e-4, 1e-2, False, None, True)),
        ("expert.lr=interval(1,4)", Number("expert.lr", 1.0, 4.0, False)),
        ("expert.head_width=int(interval(16,64))", Number("expert.head_width", 16, 64, True)),
        (
            "oscillator.steps=tag(log,int(interval(1,16)))",
            Number("oscillator.steps", 1, 16, True, None, True),
        ),
    ],
)
def test_types_are_read_off_the_sweep(text, expected):
    found = only(text)
    assert found.key == expected.key
    if isinstance(expected, Choice):
        assert found == expected
    else:
        assert isinstance(found, Number)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert (found.whole, found.step, found.log) == (expected.whole, expected.step, expected.log)


def test_a_range_draws_exactly_the_values_of_the_grid():
    parameter, drawn = only("balance.temperature=range(5,50,5)"), set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(200):
        drawn.add(parameter.suggest(study.ask()))
    assert drawn == {f"balance.temperature={t}" for t in range(5, 50, 5)}


def test_a_float_keeps_every_digit():
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    text = only("expert.lr=tag(log,interval(1e-6,1e-2))").suggest(trial)
    assert float(text.split("=")[1]) == trial.params["expert.lr"]


def test_single_values_are_fixed_and_the_last_word_counts():
    fixed, space = parse_space(["oscillator_dim=2,4", "stage=expert", "oscillator_dim=8", "fold=0", "fold=1"])
    assert fixed == ["stage=expert", "oscillator_dim=8", "fold=1"] and not space


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed=range(0,5)", "seed"),
        ("fold=0,1", "fold"),
        ("stage=vessel,expert", "stage"),
        ("data.patients=10,20", "data"),
        ("oscillator_dim=shuffle(2,4)", "shuffle"),
        ("oscillator_dim=tag(odd,choice(2,4))", "tags"),
        ("fusion=tag(log,choice(early,mean))", "logarithmic"),
        ("expert.lr=tag(log,interval(0,1))", "logarithmic"),
        ("expert.lr=tag(log,range(1,9,2))", "step"),
        ("fusion=glob(*)", "one by one"),
        ("hydra/launcher=joblib", "as often as you like"),
        ("expert.lr=interval(1", "cannot read"),
    ],
)
def test_what_makes_no_sense_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_space([text])
