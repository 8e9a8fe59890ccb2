"""Each setting is one environment variable, and a bad one is named."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from backcast.errors import ConfigError
from backcast.settings import SECRETS, Settings, check_environment

# field → (text of the variable, value read); none of them is a default
SET: dict[str, tuple[str, Any]] = {
    "home": ("/srv/backcast", Path("/srv/backcast")),
    "database_url": ("postgresql+psycopg://db/registry", "postgresql+psycopg://db/registry"),
    "artifacts_url": ("s3://bucket/backcast", "s3://bucket/backcast"),
    "store_url": ("rediss://cache:6380/2", "rediss://cache:6380/2"),
    "store_precision": ("bfloat16", "bfloat16"),
    "device": ("cuda", "cuda"),
    "max_batch": ("77", 77),
    "max_body": ("4096", 4096),
    "max_connections": ("50", 50),
    "batches_at_once": ("2", 2),
    "batches_waiting": ("0", 0),
    "batch_seconds": ("5", 5.0),
    "body_seconds": ("2.5", 2.5),
    "head_seconds": ("0.5", 0.5),
    "keep_alive_seconds": ("5", 5),
    "requests_per_second": ("100", 100),
    "vectors_per_second": ("20000", 20_000),
    "limits_url": ("redis://limits:6379/1", "redis://limits:6379/1"),
    "drain_seconds": ("0", 0.0),
    "shutdown_seconds": ("5", 5),
    "max_changed": ("500", 500),
    "reads": ("open", "open"),
    "grace_seconds": ("1.5", 1.5),
    "poll_seconds": ("0.25", 0.25),
    "key_cache_seconds": ("0", 0.0),
    "key_outage_seconds": ("60", 60.0),
    "usage_seconds": ("0.5", 0.5),
    "metrics_folder": ("/run/backcast", Path("/run/backcast")),
    "retire_idle_days": ("30", 30.0),
    "operation_timeout": ("2.5", 2.5),
    "keep_models": ("fit", "fit"),
    "gate_coverage": ("0.75", 0.75),
    "gate_change": ("0.5", 0.5),
    "gate_metric": ("0.8", 0.8),
    "log_format": ("json", "json"),
    "access_log": ("on", "on"),
    "traces": ("otlp", "otlp"),
    "url": ("https://vectors.example", "https://vectors.example"),
    "key": ("bc_0011_secret", SecretStr("bc_0011_secret")),
}


def test_every_setting_is_tried_here() -> None:
    assert SET.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("field", SET)
def test_variable_sets_the_field(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = SET[field]
    assert getattr(Settings.load(), field) != value
    monkeypatch.setenv(f"BACKCAST_{field.upper()}", text)
    assert getattr(Settings.load(), field) == value


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("BACKCAST_DEVICE", "tpu"),
        ("BACKCAST_STORE_PRECISION", "float8"),
        ("BACKCAST_MAX_BATCH", "many"),
        ("BACKCAST_MAX_BATCH", "0"),
        ("BACKCAST_MAX_BATCH", "1000001"),
        ("BACKCAST_READS", "closed"),
        ("BACKCAST_GRACE_SECONDS", "-1"),
        ("BACKCAST_POLL_SECONDS", "0"),
        ("BACKCAST_KEY_CACHE_SECONDS", "-0.5"),
        ("BACKCAST_KEY_OUTAGE_SECONDS", "-1"),
        ("BACKCAST_USAGE_SECONDS", "0"),
        ("BACKCAST_RETIRE_IDLE_DAYS", "soon"),
        ("BACKCAST_GATE_COVERAGE", "1.1"),
        ("BACKCAST_GATE_CHANGE", "0"),
        ("BACKCAST_GATE_CHANGE", "inf"),
        ("BACKCAST_GATE_METRIC", "nan"),
    ],
)
def test_bad_value_names_its_variable(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.data == {"variable": variable}
    assert caught.value.message.startswith(f"{variable}={text!r}: ")


def test_override_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_MAX_BATCH", "5")
    assert Settings.load(max_batch=6).max_batch == 6


def test_defaults_lie_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(home="kept")
    assert settings.registry_url == f"sqlite:///{tmp_path}/kept/registry.db"
    assert settings.artifacts_root == f"{tmp_path}/kept/artifacts"
    assert settings.vector_store_url == f"embedded:{tmp_path}/kept/store"


def test_named_places_win_over_home() -> None:
    settings = Settings.load(
        database_url="postgresql://db", artifacts_url="s3://b", store_url="embedded:/fast/disk"
    )
    assert settings.registry_url == "postgresql://db"
    assert settings.artifacts_root == "s3://b"
    assert settings.vector_store_url == "embedded:/fast/disk"


@pytest.mark.parametrize(
    ("store", "limits", "shared"),
    [
        ("embedded:", "", ""),
        ("redis://store:6379/0", "", "redis://store:6379/0"),
        ("rediss://store:6379/0", "redis://limits:6379/0", "redis://limits:6379/0"),
        ("embedded:", "redis://limits:6379/0", "redis://limits:6379/0"),
    ],
)
def test_limits_are_shared_where_there_is_a_redis(store: str, limits: str, shared: str) -> None:
    assert Settings.load(store_url=store, limits_url=limits).shared_limits_url == shared


def test_key_is_not_shown() -> None:
    assert "s3cret" not in repr(Settings.load(key="s3cret"))


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().max_batch = 1


def test_misspelt_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_TEST_DATABASE_URL", "left to the tests")
    check_environment()
    monkeypatch.setenv("BACKCAST_DATABSE_URL", "postgresql+psycopg://db/registry")
    with pytest.raises(ConfigError, match="BACKCAST_DATABSE_URL is no setting") as caught:
        check_environment()
    assert caught.value.message.endswith("Did you mean BACKCAST_DATABASE_URL?")


@pytest.mark.parametrize("field", SECRETS)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_secret_is_read_from_the_file_that_is_named(
    field: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = SET[field]
    (tmp_path / "secret").write_bytes(f"{text}{ending}".encode())
    monkeypatch.setenv(f"BACKCAST_{field.upper()}_FILE", str(tmp_path / "secret"))
    check_environment()
    assert getattr(Settings.load(), field) == value


def test_override_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("postgresql+psycopg://db/registry")
    monkeypatch.setenv("BACKCAST_DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert Settings.load(database_url="sqlite://").database_url == "sqlite://"


def test_secret_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("redis://here")
    monkeypatch.setenv("BACKCAST_STORE_URL_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("BACKCAST_STORE_URL", "redis://there")
    with pytest.raises(ConfigError, match="BACKCAST_STORE_URL and BACKCAST_STORE_URL_FILE are"):
        Settings.load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"", "holds nothing; it must hold one line, the value."),
        (b"\n", "holds nothing; it must hold one line, the value."),
        (b"s3cret\ns3cret\n", "holds several lines; it must hold one line, the value."),
        (b"s3cret\xff", "cannot be read: not UTF-8."),
    ],
)
def test_secret_file_without_a_secret_is_named_and_not_shown(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("BACKCAST_KEY_FILE", str(path))
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.message == f"BACKCAST_KEY_FILE={str(path)!r} {reason}"
    assert caught.value.data == {"variable": "BACKCAST_KEY_FILE"}


def test_only_secrets_are_read_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_DEVICE_FILE", "/run/secrets/device")
    with pytest.raises(ConfigError, match="BACKCAST_DEVICE_FILE is no setting"):
        check_environment()
