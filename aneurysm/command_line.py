"""What both entry points share: where the configuration lies, and errors that a user can act on."""

import difflib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aneurysm.data.errors import UserError

log = logging.getLogger("aneurysm")


def config_folder() -> Path:
    """The folder of config groups: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def entry_point(config_name: str, run: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Wrap `run(cfg)` as a command: overrides are checked first, and failures end in one sentence.

    Exit codes: 0 success, 1 the run failed, 2 the command line is wrong.
    """

    def command() -> None:
        _log_to_terminal()
        problem = override_problem(config_name, sys.argv[1:])
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            sys.exit(2)

        sweeping = any(a in ("-m", "--multirun") for a in sys.argv[1:])

        @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
        def application(cfg: DictConfig) -> Any:
            try:
                return run(cfg)
            except UserError as error:
                log.error("%s", error)
                log.debug("Where it happened:", exc_info=True)
            except KeyboardInterrupt:
                log.error("Interrupted. Run the same command again to go on from here.")
            except Exception:
                log.exception("The run stopped on an unexpected error; what was finished is kept.")
            if sweeping:
                # Hydra's sweeper goes on with the other jobs after an exception, not after an exit.
                raise RuntimeError("This job of the sweep failed; its error is above.")
            raise SystemExit(1)

        application()

    return command


def override_problem(config_name: str, arguments: list[str]) -> str | None:
    """Say what is wrong with the command line, or None.

    A key that the configuration does not have is refused with the nearest one that it has: a misspelt
    override must never be ignored.
    """
    overrides = [a for a in arguments if not a.startswith("-")]
    if any(a in ("--help", "-h", "--hydra-help", "--version") for a in arguments):
        return None
    sweep = any(a in ("-m", "--multirun") for a in arguments)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        return f"cannot read the override {error.override!r}: {str(error).splitlines()[0]}"
    groups = [p for p in parsed if _is_group(p.key_or_group)]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        if not sweep and not any(a.startswith(("+", "~")) for a in overrides):
            # Hydra refuses unknown keys itself; only the advice what to write instead takes a second look.
            try:
                return _missing_value(hydra.compose(config_name, overrides=overrides))
            except (HydraException, OmegaConfBaseException):
                pass
        try:
            base = hydra.compose(config_name, overrides=[_first_value(p) for p in groups])
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
                cfg = hydra.compose(config_name, overrides=overrides)
            except (HydraException, OmegaConfBaseException) as error:
                return str(error).splitlines()[0]
            return _missing_value(cfg)
    return None


def _missing_value(cfg: DictConfig) -> str | None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    return f"{missing[0]!r} has no value: add {missing[0]}=... to the command." if missing else None


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


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
        value = p.value()
        if _is_group(p.key_or_group) and isinstance(value, str) and value not in options:
            near = difflib.get_close_matches(value, options, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return f"{group} has no option {value!r}; it has {', '.join(options)}.{hint}"
    return message.splitlines()[0]


def _keys(cfg: DictConfig) -> set[str]:
    """Every dotted key of the configuration, branches included."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    found: set[str] = set()

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                here = f"{path}.{name}" if path else str(name)
                found.add(here)
                walk(child, here)

    walk(plain, "")
    return found
