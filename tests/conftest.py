"""Settings for all tests."""

import os
from collections.abc import Generator

import pytest
from filelock import FileLock
from hypothesis import settings

# Time limits per example would fail on a machine that does other work.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts last what must be alone: until then other tests may run in a process beside."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets a test that must be alone wait for the tests beside, before its time begins."""
    beside = os.environ.get("GALVATRON_TESTS_BESIDE")
    if beside and item.get_closest_marker("alone"):
        with FileLock(beside):
            pass
    return (yield)
