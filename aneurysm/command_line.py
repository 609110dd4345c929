"""What both entry points share: where the configuration lies, and errors that a user can act on."""

import difflib
import importlib.util
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aneurysm.data.errors import UserError
from aneurysm.runs.preemption import leave_when_asked
from aneurysm.sweeps import multirun

log = logging.getLogger("aneurysm")
LISTS = ("logger",)  # groups of which several options can be taken at once


def config_folder() -> Path:
    """The folder of config groups: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def entry_point(
    config_name: str, run: Callable[[DictConfig], Any], recorded: bool = False
) -> Callable[[], None]:
    """Wrap `run(cfg)` as a command: overrides are checked first, and failures end in one sentence.

    Exit codes: 0 success, 1 the run or a job of the sweep failed, 2 the command line is wrong, 75 the process
    was asked to leave (SIGTERM, SIGUSR1) and the same command goes on from there: requeue it.

    Args:
        recorded: a multirun keeps a record of its jobs in the experiment's folder, skips those that are
            finished and goes on after those that fail.
    """

    def command() -> None:
        log_to_terminal()
        leave_when_asked()
        arguments = sys.argv[1:]
        problem = override_problem(config_name, arguments)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            sys.exit(2)

        sweeping = any(a in ("-m", "--multirun") for a in arguments) and not _asks_for_help(arguments)
        sweep, died = None, Counter[str]()
        if recorded and sweeping:
            try:
                sweep = multirun.begin(config_folder(), config_name, _overrides(arguments))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)

        @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
        def application(cfg: DictConfig) -> Any:
            # With its closure this function is all that a launcher sends to another process or host.
            log_to_terminal()
            leave_when_asked()
            try:
                if sweep is None:
                    return run(cfg)
                return multirun.run_job(sweep, run, cfg, HydraConfig.get().overrides.task, died)
            except UserError as error:
                log.error("%s", error)
                log.debug("Where it happened:", exc_info=True)
            except KeyboardInterrupt:
                log.error("Interrupted. Run the same command again to go on from here.")
                raise SystemExit(1) from None
            except Exception:
                log.exception("The run stopped on an unexpected error; what was finished is kept.")
            if sweep is not None:
                return math.nan  # it is in the sweep's record; the other jobs go on
            if sweeping:
                # Hydra's sweeper goes on with the other jobs after an exception, not after an exit.
                raise RuntimeError("This job of the sweep failed; its error is above.")
            raise SystemExit(1)

        complete = True
        try:
            while True:
                try:
                    application()
                    break
                except SystemExit as end:
                    if sweep is None or end.code != 1 or not multirun.goes_on(sweep, arguments, died):
                        raise
        finally:  # also when a launcher lost a worker and Hydra ends the command
            if sweep is not None:
                complete = multirun.conclude(sweep)
        if not complete:
            sys.exit(1)

    return command


def override_problem(config_name: str, arguments: list[str]) -> str | None:
    """Say what is wrong with the command line, or None.

    A key that the configuration does not have is refused with the nearest one that it has: a misspelt
    override must never be ignored.
    """
    overrides = _overrides(arguments)
    if _asks_for_help(arguments):
        return None
    sweep = any(a in ("-m", "--multirun") for a in arguments)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        return f"cannot read the override {error.override!r}: {str(error).splitlines()[0]}"
    if problem := _launcher_problem(parsed):
        return problem
    if problem := _list_problem([p for p in parsed if _is_group(p.key_or_group)]):
        return problem
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        if not sweep and not any(a.startswith(("+", "~")) for a in overrides):
            # Hydra refuses unknown keys itself; only the advice what to write instead takes a second look.
            try:
                cfg = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
                return _incomplete(cfg, parsed)
            except (HydraException, OmegaConfBaseException):
                pass
        try:
            base = _compose_groups(config_name, parsed)
        except (HydraException, OmegaConfBaseException) as error:
            return _option_problem(parsed, str(error))
        known = _keys(base)
        for p in parsed:
            key = p.key_or_group
            if key.startswith("hydra") or _is_group(key):
                continue
            if key not in known:
                near = difflib.get_close_matches(key, [*known, *_groups()], n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else " See --help for the keys."
                return f"there is no configuration key {key!r}, so nothing would read it.{hint}"
        if not sweep:
            try:
                cfg = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
            except (HydraException, OmegaConfBaseException) as error:
                return str(error).splitlines()[0]
            return _incomplete(cfg, parsed)
    return None


def _incomplete(cfg: DictConfig, parsed: Sequence[Any]) -> str | None:
    """What a command that is no sweep leaves open; `cfg` includes Hydra's own part."""
    if swept := _recipe_sweep(cfg, parsed):
        keys = " and ".join(key for key, _ in swept)
        return f"this experiment is a sweep over {keys}: add -m, or give each of them one value."
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    missing = sorted(OmegaConf.missing_keys(ours))
    return f"{missing[0]!r} has no value: add {missing[0]}=... to the command." if missing else None


def recipe_sweep(config_name: str, overrides: Sequence[str]) -> list[str]:
    """What the experiment of these overrides sweeps by itself (`hydra.sweeper.params`), as `key=values`.

    Keys that the overrides set are left out: the command line wins.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        base = _compose_groups(config_name, parsed)
    return [f"{key}={values}" for key, values in _recipe_sweep(base, parsed)]


def _compose_groups(config_name: str, parsed: Sequence[Any]) -> DictConfig:
    """The configuration with the chosen options, the first of several, and with Hydra's own part."""
    groups = [_first_value(p) for p in parsed if _is_group(p.key_or_group)]
    return hydra.compose(config_name, overrides=groups, return_hydra_config=True)


def _recipe_sweep(base: DictConfig, parsed: Sequence[Any]) -> list[tuple[str, str]]:
    given = {p.get_key_element() for p in parsed}
    return [(k, str(v)) for k, v in (base.hydra.sweeper.params or {}).items() if k not in given]


def log_to_terminal() -> None:
    """Write what the package says to standard output, one line each with the time of day."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _overrides(arguments: list[str]) -> list[str]:
    return [a for a in arguments if not a.startswith("-")]


def _asks_for_help(arguments: list[str]) -> bool:
    flags = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
    return any(a.split("=")[0] in flags for a in arguments)


# Launchers of `hydra/launcher=` that come with extras of this package.
_LAUNCHERS = {
    "joblib": ("joblib", "hydra_plugins.hydra_joblib_launcher"),
    "submitit_local": ("slurm", "hydra_plugins.hydra_submitit_launcher"),
    "submitit_slurm": ("slurm", "hydra_plugins.hydra_submitit_launcher"),
}


def _launcher_problem(parsed: list[Any]) -> str | None:
    for p in parsed:
        if p.key_or_group != "hydra/launcher":
            continue
        name = p.value()
        if name in _LAUNCHERS and not _is_installed(_LAUNCHERS[name][1]):
            return f"hydra/launcher={name} is not installed: pip install 'aneurysm[{_LAUNCHERS[name][0]}]'."
        if name not in (*_LAUNCHERS, "basic"):
            near = difflib.get_close_matches(str(name), _LAUNCHERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return f"there is no launcher {name!r}; there are basic, {', '.join(_LAUNCHERS)}.{hint}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _groups() -> list[str]:
    return sorted(p.name for p in config_folder().iterdir() if p.is_dir())


def _is_group(key: str) -> bool:
    return key.split("@")[0] in _groups() and "." not in key.split("@")[0]


def _first_value(override: Any) -> str:
    if override.is_sweep_override():
        value = next(iter(override.sweep_string_iterator()))
        return f"{override.get_key_element()}={value}"
    return override.input_line


def _option_problem(parsed: list[Any], message: str) -> str:
    for p in parsed:
        group = p.key_or_group.split("@")[0]
        options = sorted(f.stem for f in (config_folder() / group).glob("*.yaml"))
        chosen = p.value() if isinstance(p.value(), list) else [p.value()]
        for value in chosen:
            if _is_group(p.key_or_group) and isinstance(value, str) and value not in options:
                near = difflib.get_close_matches(value, options, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                return f"{group} has no option {value!r}; it has {', '.join(options)}.{hint}"
    return message.splitlines()[0]


def _list_problem(groups: list[Any]) -> str | None:
    """Hydra would merge the options of any list into one, and sweep over loggers that change no result."""
    for p in groups:
        name = p.key_or_group
        if name in LISTS and p.is_sweep_override():
            values = ",".join(str(v) for v in p.sweep_string_iterator())
            return (
                f"{name} is not swept, it changes no result; for several at once write '{name}=[{values}]'."
            )
        if name not in LISTS and isinstance(p.value(), list):
            return f"{name} takes one option; to run one job with each, use -m and no brackets."
    return None


def _keys(cfg: DictConfig) -> set[str]:
    """Every dotted key of the configuration, branches included."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    plain.pop("hydra", None)
    found: set[str] = set()

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                here = f"{path}.{name}" if path else str(name)
                found.add(here)
                walk(child, here)

    walk(plain, "")
    return found
