"""Which options may differ when a run is continued."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from upslope.errors import ConfigError


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any], may_change: frozenset[str]) -> None:
    """Accepts `new` as the continuation of a run configured by `old`, or says what is in the way.

    Nested tables are compared by dotted key ("optimizer.lr"); naming a table in `may_change` frees all of it. A list
    equals a tuple, an integer the same float, and None an absent key, because TOML knows neither tuples nor None.

    Raises:
        ConfigError: names every refused key with both values.
    """
    before, after = _flatten(old), _flatten(new)
    refused = [
        f"{key} ({_show(before.get(key))} -> {_show(after.get(key))})"
        for key in sorted(before.keys() | after.keys())
        if not _equal(before.get(key), after.get(key))
        and not any(f"{key}.".startswith(f"{name}.") for name in may_change)
    ]
    if refused:
        allowed = ", ".join(sorted(may_change)) or "nothing"
        raise ConfigError(
            f"--resume cannot change {', '.join(refused)}; what may change: {allowed}; "
            "restore the old values, or start a new run from the checkpoint's model"
        )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[prefix + key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def _equal(old: Any, new: Any) -> bool:
    return isinstance(old, bool) == isinstance(new, bool) and bool(old == new or (old != old and new != new))


def _show(value: Any) -> str:
    return "not set" if value is None else repr(value)
