"""Where the configuration comes from: command line over environment over file over defaults."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from offload.daemon.ops.config_files import read_config_file
from offload.daemon.ops.config_sections import Section
from offload.daemon.ops.configuration import ENV_PREFIX, Configuration
from offload.errors import ConfigError

CONFIG_FILE_VARIABLE: Final = "OFFLOAD_CONFIG"
"""Names the file where the command line does not."""

Values = dict[str, Any]


def load_configuration(
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Configuration:
    """Merge all that was said, and check it.

    Parameters
    ----------
    file : Path, optional
        YAML or TOML; none unless given here or by ``OFFLOAD_CONFIG``.
    options : mapping of str to object, optional
        From the command line, by dotted key: ``{"server.port": 0}``.
    env : mapping of str to str, optional
        The process's environment by default.

    Raises
    ------
    ConfigError
        All that is wrong, one line each, with the key and where it was said.
    """
    env = os.environ if env is None else env
    if file is None and env.get(CONFIG_FILE_VARIABLE):
        file = Path(env[CONFIG_FILE_VARIABLE])
    layers = [
        ("the command line", _nested(options or {})),
        ("the environment", _from_environment(env)),
        (str(file), {} if file is None else _filled(read_config_file(file, env))),
    ]
    merged: Values = {}
    for where, values in reversed(layers):
        _refuse_unknown(values, where)
        merged = _merged(merged, values)
    try:
        return Configuration.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, layers))) from error


def all_keys(
    model: type[Section] | type[Configuration] = Configuration,
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key with its dots, and what is known of it, in the order of the schema."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if is_section(section):
            yield from ((f"{name}.{key}", inner) for key, inner in all_keys(section))
        else:
            yield name, field


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field of this type is a section with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _nested(said: Mapping[str, Any]) -> Values:
    """Turn dotted keys into sections, and text into what its key is."""
    known = dict(all_keys())
    nested: Values = {}
    for key, value in said.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        is_text = isinstance(value, str) and key in known
        inner[name] = _decoded(key, known[key], value) if is_text else value
    return nested


def _from_environment(env: Mapping[str, str]) -> Values:
    """Read ``OFFLOAD__SECTION__KEY``."""
    named = [name for name in env if name.upper().startswith(ENV_PREFIX)]
    return _nested(
        {name[len(ENV_PREFIX) :].lower().replace("__", "."): env[name] for name in named}
    )


def _decoded(key: str, field: FieldInfo, text: str) -> Any:
    """Read a list as JSON or as words with commas between; ``null`` is none."""
    source = EnvSettingsSource(Configuration)
    if text == "null" or not source.field_is_complex(field):
        return None if text == "null" else text
    if not text.lstrip().startswith("["):
        return [word.strip() for word in text.split(",") if word.strip()]
    try:
        return source.decode_complex_value(key, field, text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} is not a JSON list") from error


def _refuse_unknown(values: Values, where: str) -> None:
    known = [key for key, _ in all_keys()]
    sections = _section_names()
    for key in _leaves(values, sections):
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *sorted(sections)], 1, 0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest is {near!r}")


def _leaves(values: Values, sections: set[str], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _leaves(value, sections, f"{key}.")
        elif key not in sections:
            yield key


def _section_names() -> set[str]:
    return {
        ".".join(parts[:depth])
        for parts in (key.split(".") for key, _ in all_keys())
        for depth in range(1, len(parts))
    }


def _filled(values: Values, prefix: str = "") -> Values:
    """Leave out sections without any keys: YAML has None for them, and they mean the defaults."""
    sections = _section_names()
    return {
        name: _filled(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None or f"{prefix}{name}" not in sections
    }


def _merged(lower: Values, upper: Values) -> Values:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _problems(error: ValidationError, layers: list[tuple[str, Values]]) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        path = [part for part in problem["loc"] if isinstance(part, str)]
        key = ".".join(path)
        where = next((where for where, values in layers if _has(values, path)), None)
        said = problem["msg"].removeprefix("Value error, ")
        yield ": ".join(part for part in (where, key, said) if part)


def _has(values: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return bool(path)
