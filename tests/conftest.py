"""What every test gets."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Frames that a search found are kept here, not in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
