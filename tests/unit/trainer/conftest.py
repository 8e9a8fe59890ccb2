"""The generated data set, and one thread to compute on."""

from collections.abc import Iterator

import pytest

from trainer.data.dataset import Dataset


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread for the length of a module."""
    from tests.trainer_support import threads

    with threads(1):
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A generated data set of 300 users, 150 items and 4000 edges."""
    from tests.trainer_support import synthetic

    return synthetic(tmp_path_factory.mktemp("data") / "synthetic")
