"""Settings as a person compares them: flat, in the words of the command line, and only those that differ."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import aneurysm

Value = str | int | float | bool | None
ABSENT = "–"  # the setting belongs to an option that this variant does not use
_NONE = "aneurysm.build.absent"
# Repeats of a variant differ in it; it is not a setting to compare.
_REPEAT = "seed"


def flat(settings: Mapping[str, Any]) -> dict[str, Value]:
    """Nested settings by dotted names; an option (`_target_`) becomes the word that chooses it.

    Lists become their JSON text. The seed is left out.
    """
    found: dict[str, Value] = {}
    _flatten("", settings, found)
    found.pop(_REPEAT, None)
    return found


def _flatten(path: str, node: Any, found: dict[str, Value]) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            found[path] = option_word(str(node["_target_"]))
        for name, value in node.items():
            if name not in ("_target_", "_partial_"):
                _flatten(f"{path}.{name}" if path else str(name), value, found)
    elif isinstance(node, list):
        found[path] = json.dumps(node)
    else:
        found[path] = node if isinstance(node, str | int | float | bool) or node is None else str(node)


def option_word(target: str) -> str:
    """The word that chooses an option on the command line, or its class in small letters.

    Several files of conf/ may build one class (waveformer, waveformer_base): their settings tell them apart.
    """
    if target == _NONE:
        return "none"
    words = _option_files().get(target, ())
    if len(words) == 1:
        return words[0]
    name = target.rsplit(".", 1)[-1]
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@cache
def _option_files() -> dict[str, tuple[str, ...]]:
    """Target -> names of the option files that build it, from the first lines that say so."""
    package = Path(aneurysm.__file__).parent
    conf = next((c for c in (package / "conf", package.parent / "conf") if c.is_dir()), None)
    words: dict[str, set[str]] = {}
    for file in conf.glob("*/*.yaml") if conf else ():
        if target := re.search(r"^_target_:\s*(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            words.setdefault(target[1], set()).add(file.stem)
    return {target: tuple(sorted(names)) for target, names in words.items()}


def swept(variants: Sequence[Mapping[str, Value]], options: Sequence[str]) -> list[str]:
    """Names of the settings that differ, in the order of the first variant that has them.

    What an option brings along (`oscillator.steps` of akorn) is no difference of its own when it only comes
    and goes with the option: it counts when it differs between variants that chose the same one.

    Args:
        variants: flat settings.
        options: names among them that choose an option.
    """
    names = list(dict.fromkeys(name for one in variants for name in one))
    return [name for name in names if _differs(name, variants, _above(name, options))]


def _above(name: str, options: Sequence[str]) -> list[str]:
    return [o for o in options if name.startswith(f"{o}.")]


def _differs(name: str, variants: Sequence[Mapping[str, Value]], above: list[str]) -> bool:
    if not above:
        return len({_comparable(one.get(name, ABSENT)) for one in variants}) > 1
    seen: dict[tuple[Value, ...], set[tuple[str, Value]]] = {}
    for one in variants:
        if name in one:
            seen.setdefault(tuple(one.get(o) for o in above), set()).add(_comparable(one[name]))
    return any(len(values) > 1 for values in seen.values())


def _comparable(value: Value) -> tuple[str, Value]:
    """1 and 1.0 are one value, 1 and True are two."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number", float(value)
    return type(value).__name__, value


def options_of(settings: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted names of the nodes that choose an option."""
    found = [path] if path and "_target_" in settings else []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += options_of(value, f"{path}.{name}" if path else str(name))
    return found


def short_name(name: str) -> str:
    """As typed on the command line: oscillator.oscillator_dim is set by oscillator_dim."""
    parts = name.split(".")
    return parts[-1] if len(parts) > 1 and parts[-1].startswith(f"{parts[-2]}_") else name


def text(value: Value) -> str:
    """A value for reading."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
