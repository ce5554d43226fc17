from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collegium.errors import SettingsError
from collegium.settings import DEFAULT_BASE, Settings


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_everything_has_a_default() -> None:
    settings = Settings.load({})
    assert settings.base_model == DEFAULT_BASE
    assert settings.host == "127.0.0.1"
    assert settings.home.is_absolute()


def test_flags_win_over_the_environment_which_wins_over_the_file(home: Path) -> None:
    write(home / "collegium.toml", "max_tokens = 1\nport = 1\nthreads = 1\n")
    environ = {"COLLEGIUM_HOME": str(home), "COLLEGIUM_PORT": "2", "COLLEGIUM_THREADS": "2", "PORT": "9"}
    settings = Settings.load(environ, threads=3, port=None)
    assert (settings.max_tokens, settings.port, settings.threads) == (1, 2, 3)
    assert settings.home == home


def test_the_home_that_a_flag_names_is_where_the_file_is(home: Path) -> None:
    write(home / "collegium.toml", "port = 1\n")
    assert Settings.load({"COLLEGIUM_HOME": "/nowhere"}, home=home).port == 1


def test_another_file_may_be_named(home: Path, tmp_path: Path) -> None:
    write(home / "collegium.toml", "port = 1\n")
    other = write(tmp_path / "other.toml", f"port = 2\nhome = '{home}'\n")
    settings = Settings.load({"COLLEGIUM_CONFIG": str(other)})
    assert (settings.port, settings.home) == (2, home)


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"COLLEGIUM_CONFIG names .*missing\.toml"):
        Settings.load({"COLLEGIUM_CONFIG": str(tmp_path / "missing.toml")})


@pytest.mark.parametrize("content", [b"port = \n", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(home: Path, content: bytes) -> None:
    (home / "collegium.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"collegium\.toml is not a TOML file"):
        Settings.load({}, home=home)


def test_an_unknown_name_in_the_file_lists_the_known_ones(home: Path) -> None:
    write(home / "collegium.toml", "prot = 80\n")
    with pytest.raises(SettingsError, match=r"Unknown setting 'prot'\. .*Known settings: .*host.*port"):
        Settings.load({}, home=home)


def test_an_unknown_name_in_the_environment_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"Unknown setting 'prot'\. .*Known settings: .*host.*port"):
        Settings.load({"COLLEGIUM_PROT": "80"})


def test_what_other_parts_read_from_the_environment_is_no_setting() -> None:
    assert Settings.load({"COLLEGIUM_DATA": "/somewhere"}) == Settings.load({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("port", "http"),
        ("device", "tpu"),
        ("threads", -1),
        ("max_tokens", 0),
        ("temperature", 2.5),
        ("top_p", 0),
        ("repetition_penalty", 0.5),
        ("max_prompt_tokens", 1),
        ("max_queue", 0),
        ("precision", "int4"),
        ("max_rows", 0),
        ("max_rows", 1025),
        ("kv_cache_mb", 15),
        ("adapter_slots", 0),
        ("passages", 51),
        ("passage_score", 1.5),
        ("context_tokens", -1),
        ("encoder_precision", "int4"),
        ("log_decisions", "perhaps"),
        ("log_days", 0),
        ("remote_hosts", 5),
        ("fetch_timeout", 0),
    ],
)
def test_a_wrong_value_is_shown_with_its_setting(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"Setting '{name}': .*got '?{value}'?") as caught:
        Settings.load({}, **{name: value})
    assert caught.value.hint
    assert name in caught.value.hint


@pytest.mark.parametrize("value", ["gpu.example.com, [::1],GPU2", ["gpu.example.com", "::1", "gpu2"]])
def test_hosts_are_a_list_or_a_text_with_commas(value: Any) -> None:
    expected = ("gpu.example.com", "::1", "gpu2")
    assert Settings.load({}, remote_hosts=value).remote_hosts == expected
    if isinstance(value, str):
        assert Settings.load({"COLLEGIUM_REMOTE_HOSTS": value}).remote_hosts == expected
        assert Settings.load({"COLLEGIUM_REMOTE_HOSTS": ""}).remote_hosts == ()


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"'port'.*'threads'|'threads'.*'port'"):
        Settings.load({"COLLEGIUM_PORT": "x", "COLLEGIUM_THREADS": "y"})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load({}).port = 1


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_PORT", "4321")
    assert Settings.load().port == 4321


def test_a_home_may_begin_with_a_tilde(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "collegium.toml", "port = 1\n")
    monkeypatch.setenv("HOME", str(home.parent))
    assert Settings.load({"COLLEGIUM_HOME": f"~/{home.name}"}).port == 1
