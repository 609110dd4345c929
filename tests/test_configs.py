"""Every option of every group composes and builds what it says."""

import hydra
import pytest
from hydra.utils import get_class, get_method
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
        assert get_class(node._target_) is not None


@pytest.mark.parametrize("option", options("segmenter"))
def test_segmenters_build_with_channels(option):
    net = build(compose(f"segmenter@vessel.net={option}").vessel.net, in_channels=1, out_channels=1)
    assert sum(p.numel() for p in net.parameters()) > 1000


@pytest.mark.parametrize("group", ["oscillator", "fusion", "metadata", "physics"])
def test_each_option_makes_another_expert(group):
    names = set()
    for option in options(group):
        net = build_expert(compose(f"{group}={option}"), graph_features=8)
        names.add(tuple(sorted(n for n, _ in net.named_parameters())))
    assert len(names) == len(options(group))


@pytest.mark.parametrize("dim", [2, 4, 8, 16])
def test_oscillator_dim_reaches_the_oscillators(dim):
    net = build_expert(compose(f"oscillator_dim={dim}"), graph_features=8)
    assert net.oscillator.oscillator_dim == dim


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
