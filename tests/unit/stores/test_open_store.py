"""Which store a URL names."""

from pathlib import Path

import pytest

from backcast.errors import ConfigError
from backcast.settings import Settings
from backcast.stores import EmbeddedStore, open_store
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


def test_password_in_a_wrong_url_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(Settings(store_url="valkey://ann:s3cret@host"))
    assert "s3cret" not in caught.value.message
