"""A wrong command line ends in one sentence that names the nearest right word."""

import pytest

from aneurysm.command_line import config_folder, override_problem


def test_the_plain_command_is_accepted():
    assert override_problem("train", []) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage=vessel", "loss=tversky", "loss.fn_weight=0.8"],
        ["stage=expert", "fusion=early", "oscillator=none", "physics=none", "balance=fixed", "fold=2"],
        ["oscillator_dim=8", "balance.temperature=50"],
        ["data=rsna", "data.root=/data/rsna", "experiment_name=rsna"],
        ["segmenter@vessel.net=segformer3d", "trainer.compile=true"],
        ["segmenter@vessel.net=dynunet", "segmenter@smart_net.net=dynunet_base"],
        ["experiment=phantom_full"],
        ["-m", "stage=expert", "oscillator_dim=2,4,8", "fold=0,1,2"],
        ["-m", "stage=expert", "fusion=early,mean", "hydra/launcher=basic"],
        ["-m", "stage=expert", "fold=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["-m", "fold=0,1", "hydra/launcher=submitit_local"],
        ["-m", "fold=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "failed=skip"],
    ],
)
def test_documented_commands_are_accepted(overrides):
    assert override_problem("train", overrides) is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("oscilator_dim=8", "oscillator_dim"),
        ("loss.fn_wieght=0.7", "loss.fn_weight"),
        ("expert.epoch=3", "expert.epochs"),
        ("osclilator=none", "oscillator"),
        ("oscillator=akron", "akorn"),
        ("loss=tverski", "tversky"),
        ("+unread=1", "nothing would read it"),
        ("data=rsna", "data.root"),
        ("fold", "fold"),
        ("hydra/launcher=jobib", "Did you mean 'joblib'"),
        ("hydra/launcher=slurm", "submitit_slurm"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_word(override, expected):
    problem = override_problem("train", [override])
    assert problem is not None
    assert expected in problem
    assert "\n" not in problem


def test_a_value_that_a_group_does_not_have_lists_its_options():
    problem = override_problem("train", ["fusion=late_sum"])
    assert problem is not None
    for option in ("cross_attention", "early", "mean"):
        assert option in problem


def test_predict_says_which_argument_is_missing():
    problem = override_problem("predict", ["bundle=somewhere", "input=x"])
    assert problem is not None and "output" in problem


def test_the_configuration_is_found_beside_the_package():
    assert (config_folder() / "train.yaml").is_file()
