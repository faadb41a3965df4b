"""What the whole suite shares: how hypothesis chooses its examples, and what -O leaves out."""

import os

import pytest
from hypothesis import settings

# The suite tries the same examples every time, so that it fails because of a change and never
# by chance; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip under -O what is about our own asserts: they guard against our bugs, not the world.

    Whatever comes from outside is checked in any case, and tested so.
    """
    if __debug__:
        return
    for item in items:
        if item.get_closest_marker("asserts"):
            item.add_marker(pytest.mark.skip(reason="-O compiles asserts away"))
