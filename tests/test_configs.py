"""Every option of every group composes and builds what it says."""

import re
import subprocess
import sys

import hydra
import pytest
from hydra.utils import get_class, get_method, get_object
from omegaconf import DictConfig, OmegaConf

from aneurysm.build import build, build_expert
from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError

BUILT = ("backbone", "loss", "balance", "physics", "masking")
CALLED = ("graph_net", "oscillator", "fusion", "metadata")


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in BUILT for o in options(g)])
def test_option_builds(group, option):
    made = build(compose(f"{group}={option}")[group])
    assert (made is None) == (option == "none")


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in CALLED for o in options(g)])
def test_option_names_an_existing_class(group, option):
    node = compose(f"{group}={option}")[group]
    if option == "none":
        assert build(node) is None
    else:
        assert callable(get_object(node._target_))


@pytest.mark.parametrize("option", options("segmenter"))
def test_segmenters_build_with_channels(option):
    net = build(compose(f"segmenter@vessel.net={option}").vessel.net, in_channels=1, out_channels=1)
    assert sum(p.numel() for p in net.parameters()) > 1000


@pytest.mark.parametrize("group", ["oscillator", "fusion", "metadata", "physics"])
def test_each_option_makes_another_expert(group):
    names = set()
    for option in options(group):
        net = build_expert(compose(f"{group}={option}"), graph_features=8)
        # A placebo has the parameters of what it stands in for.
        names.add((type(net.physics), *sorted(n for n, _ in net.named_parameters())))
    assert len(names) == len(options(group))


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_oscillator_dim_reaches_the_oscillators(dim):
    net = build_expert(compose(f"oscillator_dim={dim}"), graph_features=8)
    assert net.backbone.stages[2][-1].oscillator.oscillator_dim == dim


@pytest.mark.parametrize("option", ["akorn", "itrsa"])
def test_oscillators_stand_where_the_configuration_says(option):
    changes = ["oscillator.strides=[4,16]", "oscillator.placement=in_attention", "oscillator.steps=2"]
    net = build_expert(compose(f"oscillator={option}", *changes), graph_features=8)
    held = [stage[-1].oscillator for stage in net.backbone.stages]
    assert [block is not None for block in held] == [False, True, False, True]
    assert {stage[-1].placement for stage in net.backbone.stages} == {None, "in_attention"}
    assert held[1].steps == 2


REFUSED = {
    "oscillator.placement=inside": "after_mlp, before_mlp or in_attention",
    "oscillator.strides=[3]": r"strides \[2, 4, 8, 16\]",
    "oscillator_dim=1": "dimension >= 2",
    "oscillator.connectivity=ring": "attention",
    "backbone.heads=[3,4,8,8]": "heads",
    "smart_net.net.widths=[16,32]": "per stage",
}


def test_a_network_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    """In a process of its own: here the types of arguments are checked before the networks can say a word."""
    script = (
        "import sys, hydra, aneurysm.train as t, aneurysm.data.errors as e\n"
        "with hydra.initialize_config_dir(sys.argv[1], version_base='1.3'):\n"
        "    for override in sys.argv[3:]:\n"
        "        paths = 'paths.outputs=' + sys.argv[2]\n"
        "        cfg = hydra.compose('train', [override, 'experiment=smoke', paths])\n"
        "        try: t.train(cfg)\n"
        "        except e.UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(config_folder()), str(tmp_path), *REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=config_folder().parent)
    said = done.stdout.splitlines()
    assert len(said) == len(REFUSED)
    for line, message in zip(said, REFUSED.values(), strict=True):
        assert re.search(message, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", options("experiment"))
def test_experiments_compose(option):
    extra = {"intra": ["data.meshes=x"], "rsna_full": ["data.root=x"]}.get(option, [])
    cfg = compose(f"experiment={option}", *extra)
    assert cfg.experiment_name == option
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("option", options("data"))
def test_readers_exist(option):
    target = compose(f"data={option}").data._target_
    assert callable(get_class(target)) or callable(get_method(target))


def test_a_setting_of_another_option_is_refused_in_one_sentence(tmp_path):
    cfg = compose("experiment=smoke", "data=folder", f"data.root={tmp_path}")
    with pytest.raises(UserError, match="unexpected keyword argument 'patients': an experiment file"):
        build(cfg.data)
