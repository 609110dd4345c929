"""The jobs of a multirun command, exactly as Hydra's basic sweeper makes them."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from aneurysm.data.errors import UserError


@dataclass(frozen=True)
class Multirun:
    """What a multirun command asks for."""

    experiment: Path  # folder of the experiment, without what is swept
    overrides: list[list[str]]  # of every job, in order


def expand(config_folder: Path, config_name: str, arguments: list[str]) -> Multirun:
    """Expand the overrides of a multirun command, those in the configuration's `hydra.sweeper.params` too.

    Raises:
        UserError: the overrides do not fit the configuration or a launcher's settings, the sweep has no fixed
            list of jobs, or the sweeper is not the basic one.
    """
    with hydra.initialize_config_dir(str(config_folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(config_loader=loader)
        given = parser.parse_overrides(arguments)
        fixed = [o.input_line for o in given if not o.is_sweep_override() and o.input_line is not None]
        try:
            cfg = hydra.compose(config_name, overrides=fixed, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(str(error).splitlines()[0]) from error
        if not str(cfg.hydra.sweeper._target_).endswith(".BasicSweeper"):
            raise UserError("Sweeps run with Hydra's basic sweeper; for a search: python -m aneurysm.search.")
        params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
        asked = [o for o in [*parser.parse_overrides(params), *given] if not o.is_hydra_override()]
        try:
            jobs = BasicSweeper.split_arguments(asked, None)[0]
        except HydraException as error:
            raise UserError(f"{error}: give the values as a list, such as lr=0.1,0.01.") from error
        return Multirun(Path(cfg.paths.outputs) / cfg.experiment_name, jobs)
