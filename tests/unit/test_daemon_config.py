"""Where the daemon's configuration comes from, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.http.options import HttpOptions
from offload.daemon.ops.access import Access
from offload.daemon.ops.config_convert import engine_settings, http_options
from offload.daemon.ops.config_live import LiveConfiguration
from offload.daemon.ops.config_sources import load_configuration
from offload.daemon.ops.config_text import as_values, as_yaml, changes, schema, table, template
from offload.daemon.ops.config_units import parse_duration, parse_duration_or_never, parse_share
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.tenants import key_line
from offload.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def written(tmp_path: Path, text: str, name: str = "offload.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_configuration_without_any_source_is_the_engines_defaults(tmp_path: Path) -> None:
    settings = engine_settings(load_configuration(None, {"data_path": str(tmp_path)}, {}))
    assert settings == EngineSettings(tmp_path)


def test_key_said_by_all_sources_is_taken_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {port: 1, host: 127.0.0.1}\nsessions: {ttl: 1h}\n")
    env = {"OFFLOAD__SERVER__PORT": "2", "OFFLOAD__SESSIONS__TTL": "2h"}
    found = load_configuration(path, {"server.port": "3"}, env)
    assert found.server.port == 3
    assert found.sessions.ttl == 7200.0
    assert found.server.host == "127.0.0.1"


def test_file_that_only_the_environment_names_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {port: 77}\n")
    assert load_configuration(None, {}, {"OFFLOAD_CONFIG": str(path)}).server.port == 77


def test_same_values_as_toml_and_yaml_are_the_same_configuration(tmp_path: Path) -> None:
    toml = written(tmp_path, '[sessions]\nttl = "1h"\n[tiers.disk]\nsize = "5GiB"\n', "a.toml")
    yml = written(tmp_path, "sessions:\n  ttl: 1h\ntiers:\n  disk: {size: 5GiB}\n")
    assert load_configuration(toml, {}, {}) == load_configuration(yml, {}, {})


def test_section_without_keys_means_its_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "server:\n  limits:\nsessions:\n")
    assert load_configuration(path, {}, {}) == Configuration()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sevrer: {port: 1}", "unknown key 'sevrer'; the nearest is 'server'"),
        ("server: {prot: 1}", "unknown key 'server.prot'; the nearest is 'server.port'"),
        ("server: {limits: {bdy: 1}}", "the nearest is 'server.limits.body'"),
        ("server: {port: 70000}", "server.port: Input should be less than or equal to 65535"),
        ("sessions: {ttl: soon}", "sessions.ttl: 'soon' is not a duration"),
        ("sessions: {ttl: -2}", "sessions.ttl: -2 is not a duration"),
        ("sessions: {hard_pin_share: 120%}", "sessions.hard_pin_share: '120%' is not a share"),
        ("tiers: {host: {size: 5 parsecs}}", "tiers.host.size: '5 parsecs'"),
        ("tiers: {device: {size: 0%}}", "tiers.device.size: '0%' is not a size"),
        ("server: {host: 0.0.0.0}", "there are no keys"),
        ("server: 5", "server: "),
        ("- 1", "is a list, not sections with keys"),
        ("a: [", "offload.yaml: while parsing"),
        ("server: {api_key: '${env:NOT_SET}'}", "the variable NOT_SET of ${env:NOT_SET}"),
        ("version: 2", "version: Input should be 1"),
    ],
)
def test_file_that_is_wrong_is_refused_with_the_key_and_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_configuration(path, {}, {})
    assert "no keys" in message or str(path) in str(caught.value)


def test_two_mistakes_are_both_told(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {port: x}\nsessions: {ttl: y}\n")
    with pytest.raises(ConfigError) as caught:
        load_configuration(path, {}, {})
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "server.port",
        "sessions.ttl",
    ]


def test_mistake_in_the_environment_is_said_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"the environment: server\.port"):
        load_configuration(None, {}, {"OFFLOAD__SERVER__PORT": "x"})


def test_list_in_the_environment_is_words_or_json() -> None:
    words = load_configuration(None, {}, {"OFFLOAD__METRICS__COMPAT": "vllm, llamacpp"})
    parsed = load_configuration(None, {}, {"OFFLOAD__METRICS__COMPAT": '["vllm","llamacpp"]'})
    assert words == parsed == Configuration()


def test_secret_from_the_environment_is_shown_only_if_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {api_key: '${env:THE_KEY}'}\n")
    found = load_configuration(path, {}, {"THE_KEY": "sesame"})
    assert "sesame" not in as_yaml(as_values(found)) + repr(found)
    assert as_values(found, redact=False)["server"]["api_key"] == "sesame"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0), ("250ms", 0.25), ("7", 7.0), (2.5, 2.5)],
)
def test_duration_as_people_write_it_is_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", [-1, "-1", "never", None])
def test_duration_that_never_ends_is_none(value: Any) -> None:
    assert parse_duration_or_never(value) is None


@pytest.mark.parametrize("value", [True, "1 fortnight", float("nan"), float("inf"), -1, [], "-3s"])
def test_duration_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(value)


@pytest.mark.parametrize("value", ["25%", 0.25, "0.25"])
def test_share_as_people_write_it_is_read(value: str | float) -> None:
    assert parse_share(value) == 0.25


def test_share_of_the_host_becomes_bytes_of_its_memory() -> None:
    half = engine_settings(load_configuration(None, {"tiers.host.size": "50%"}, {})).capacity
    whole = engine_settings(load_configuration(None, {"tiers.host.size": "100%"}, {})).capacity
    assert half is not None
    assert whole is not None
    assert abs(int(whole["cpu"]) - 2 * int(half["cpu"])) <= 1
    assert int(half["cpu"]) > 1 << 28


@pytest.mark.parametrize(
    ("host", "codec"), [("raw", "bf16x"), ("kivi4", {"cpu": "kivi4", "disk": "bf16x"})]
)
def test_codec_of_the_host_stands_beside_that_of_the_disk(
    host: str, codec: str | dict[str, str]
) -> None:
    found = load_configuration(None, {"tiers.codec": "bf16x", "tiers.host.codec": host}, {})
    assert engine_settings(found).codec == codec


def test_capacity_of_a_tier_that_is_not_used_is_left_out() -> None:
    found = load_configuration(None, {"tiers.use": "gpu", "tiers.disk.size": "1GiB"}, {})
    assert engine_settings(found).capacity is None


def test_configuration_without_any_source_is_the_http_sides_defaults(tmp_path: Path) -> None:
    options = http_options(load_configuration(None, {"data_path": str(tmp_path)}, {}))
    assert options == HttpOptions(tmp_path)


def test_limits_reach_the_http_side() -> None:
    found = load_configuration(
        None, {"server.limits.body": "1MiB", "server.sse_keepalive": "3s"}, {}
    )
    options = http_options(found)
    assert (options.max_body_bytes, options.keepalive_s) == (1 << 20, 3.0)


def test_template_is_a_configuration_with_nothing_changed(tmp_path: Path) -> None:
    assert load_configuration(written(tmp_path, template()), {}, {}) == Configuration()


def test_template_with_every_key_uncommented_is_still_the_defaults(tmp_path: Path) -> None:
    text = re.sub(r"^(\s*)# ([a-z_]+: .*)$", r"\1\2", template(), flags=re.MULTILINE)
    assert load_configuration(written(tmp_path, text), {}, {}) == Configuration()


def test_configuration_written_out_and_read_again_is_the_same(tmp_path: Path) -> None:
    options = {"sessions.ttl": "7d", "tiers.host.size": "80%", "tiers.disk.size": "500GiB"}
    found = load_configuration(None, options, {})
    path = written(tmp_path, as_yaml(as_values(found, redact=False)))
    assert load_configuration(path, {}, {}) == found


@pytest.mark.parametrize("name", ["examples/offload.yaml", "deploy/offload.yaml"])
def test_example_fits_the_schema_and_the_model(name: str) -> None:
    path = ROOT / name
    jsonschema.validate(yaml.safe_load(path.read_text()), schema())
    assert load_configuration(path, {}, {}).version == 1


def test_defaults_fit_the_schema() -> None:
    jsonschema.validate(as_values(Configuration()), schema())


def test_table_of_keys_in_the_docs_is_that_of_the_model() -> None:
    assert table() in (ROOT / "docs/daemon-config.md").read_text()


def test_every_key_says_what_it_is_and_when_it_changes() -> None:
    rows = [line.split(" | ") for line in table().splitlines()[2:]]
    assert {row[2] for row in rows} == {"live", "restart"}
    assert all(row[3].rstrip(" |") for row in rows)


def test_changes_are_told_apart_by_what_a_reload_can_do() -> None:
    new = load_configuration(None, {"server.port": "1", "server.limits.inflight": "2"}, {})
    assert changes(Configuration(), new) == {
        "server.port": "restart",
        "server.limits.inflight": "live",
    }


def live_from(path: Path) -> tuple[LiveConfiguration, Access]:
    access = Access()
    first = load_configuration(path, {}, {})
    return LiveConfiguration(first, lambda: load_configuration(path, {}, {}), access), access


def test_reload_of_a_good_file_changes_what_is_live_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {port: 1}\n")
    live, _ = live_from(path)
    written(tmp_path, "server: {port: 2, limits: {inflight: 3}}\n")
    assert live.reload()
    assert live.current.server.limits.inflight == 3
    assert live.current.server.port == 1


def test_reload_of_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "server: {limits: {inflight: 3}}\n")
    live, _ = live_from(path)
    before = live.current
    written(tmp_path, "server: {limits: {inflight: 0}, port: 5}\n")
    assert not live.reload()
    assert not live.is_good
    assert live.current is before


def test_reload_of_a_file_of_keys_that_is_bad_keeps_the_old_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(key_line("ann", "first", is_admin=False) + "\n")
    keys.chmod(0o600)
    live, access = live_from(
        written(tmp_path, json.dumps({"server": {"api_keys_file": str(keys)}}))
    )
    assert live.reload()
    keys.write_text("not a key\n")
    assert not live.reload()
    assert access.tenant_of({"authorization": "Bearer first"}) is not None
