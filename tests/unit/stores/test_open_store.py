"""Which store a URL names."""

import traceback
from pathlib import Path

import pytest

from backcast.errors import ConfigError
from backcast.settings import Settings
from backcast.stores import EmbeddedStore, open_store, shown_url
from backcast.stores.redis import RedisStore


def test_default_is_a_folder_under_home(tmp_path: Path) -> None:
    assert isinstance(open_store(Settings(home=tmp_path)), EmbeddedStore)
    assert (tmp_path / "store").is_dir()


def test_folder_may_be_elsewhere(tmp_path: Path) -> None:
    open_store(Settings(home=tmp_path / "home", store_url=f"embedded:{tmp_path / 'fast'}"))
    assert [path.name for path in tmp_path.iterdir()] == ["fast"]


def test_redis_is_a_url(redis_url: str) -> None:
    store = open_store(Settings(store_url=redis_url))
    assert isinstance(store, RedisStore)
    store.close()


@pytest.mark.parametrize("url", ["memcached://host", "embedded", "", "/srv/store"])
def test_unknown_scheme_is_a_setting_to_correct(url: str) -> None:
    with pytest.raises(ConfigError, match=f"BACKCAST_STORE_URL='{url}': the scheme is embedded"):
        open_store(Settings(store_url=url))


def test_malformed_redis_url_is_a_setting_to_correct() -> None:
    with pytest.raises(ConfigError, match="BACKCAST_STORE_URL: "):
        open_store(Settings(store_url="redis://host:port/0"))


@pytest.mark.parametrize(
    "url",
    [
        "valkey://ann:s3cret@host",
        "valkey://host?password=s3cret",
        "redis://:s3cret/x@host",
        "redis://:s3cret?x@host:1",
        "redis://:s3cret#x@host:1",
        "redis://ann:s3cret@[host",
        "redis://ann:s3cret@host:port",
        "redis://host?password=s3cret&socket_timeout=soon",
        "redis://host?password=s3cret&pasword=s3cret",
        "rediss://ann:s3cret@host?ssl_cert_reqs=s3cret",
        "rediss://ann:s3cret@host?ssl_ca_certs=/none/ca.pem",
    ],
)
def test_password_in_a_wrong_url_is_not_shown(url: str) -> None:
    assert "s3cret" not in shown_url(url)
    with pytest.raises(ConfigError, match="BACKCAST_STORE_URL") as caught:
        open_store(Settings(store_url=url))
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_option_that_redis_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'ssl_ca_cert'"):
        open_store(Settings(store_url="rediss://host?ssl_ca_cert=/etc/ca.pem"))


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_file_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"BACKCAST_STORE_URL: {name}=/none is no file"):
        open_store(Settings(store_url=f"rediss://host?{name}=/none"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("embedded:/srv/store", "embedded:/srv/store"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://ann:p@ss@host:6379/0?password=p", "redis://host:6379/0"),
        ("rediss://host/2?ssl_ca_certs=/etc/ca.pem", "rediss://host/2"),
        ("redis://:12/34@host", "redis:…"),
        ("redis://host?password=p@ss", "redis:…"),
    ],
)
def test_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown
