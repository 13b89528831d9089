"""The configuration written out: as YAML, as a commented template, as a schema, as a table."""

import json
from collections.abc import Iterator
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from pydantic import SecretStr

from offload.daemon.ops.config_sections import Section
from offload.daemon.ops.config_sources import all_keys, is_section
from offload.daemon.ops.configuration import Configuration

REDACTED: Final = "********"
_TITLE: Final = "# Configuration of the offload daemon. Every key, with its default.\n"


def as_values(configuration: Configuration, *, redact: bool = True) -> dict[str, Any]:
    """Return the configuration as plain values, sizes and durations as people write them.

    Parameters
    ----------
    configuration : Configuration
    redact : bool
        Write asterisks for secrets.
    """
    values: dict[str, Any] = configuration.model_dump(mode="json")
    secret = configuration.server.api_key
    if secret is not None:
        values["server"]["api_key"] = REDACTED if redact else secret.get_secret_value()
    return values


def as_yaml(values: dict[str, Any]) -> str:
    """Return plain values as YAML, in the order that they have."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def schema() -> dict[str, Any]:
    """Return the JSON schema; ``reload`` of each key says whether SIGHUP changes it."""
    described = Configuration.model_json_schema()
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    described["title"] = "offload daemon"
    return described


def template() -> str:
    """Return a file with every key, its default and what it means, commented out."""
    return _TITLE + "version: 1\n" + "".join(_template_lines(Configuration, as_values(_DEFAULTS)))


def table() -> str:
    """Return a Markdown table of every key: its default, whether it reloads, what it means."""
    values = as_values(_DEFAULTS)
    lines = ["| key | default | reload | what it is |", "|---|---|---|---|"]
    for key, field in all_keys():
        extra = field.json_schema_extra
        reload = extra.get("reload", "") if isinstance(extra, dict) else ""
        shown = json.dumps(_at(values, key)) if _at(values, key) is not None else "–"
        lines.append(f"| `{key}` | `{shown}` | {reload} | {field.description} |")
    return "\n".join(lines).replace("`–`", "–") + "\n"


def changes(old: Configuration, new: Configuration) -> dict[str, str]:
    """Return the keys that differ, each with ``live`` or ``restart``."""
    fields = dict(all_keys())
    return {
        key: str(extra.get("reload"))
        for key, field in fields.items()
        if isinstance(extra := field.json_schema_extra, dict) and _of(old, key) != _of(new, key)
    }


def _template_lines(
    model: type[Section] | type[Configuration], values: dict[str, Any], indent: str = ""
) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name == "version":
            continue
        if is_section(field.annotation):
            yield f"\n{indent}# {field.annotation.__doc__}\n{indent}{name}:\n"
            yield from _template_lines(field.annotation, values[name], indent + "  ")
        else:
            yield f"{indent}# {name}: {json.dumps(values[name])}  # {field.description}\n"


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _of(configuration: Configuration, key: str) -> Any:
    value: Any = configuration
    for name in key.split("."):
        value = getattr(value, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


_DEFAULTS: Final = Configuration()
