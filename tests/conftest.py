"""What all tests share."""

import os

import pytest
from hypothesis import settings

from tests.helpers.paths import ROOT

LONGEST = ("test_smoke.py", "test_fit.py", "test_training_stages.py", "test_faults.py")

settings.register_profile("dpar", deadline=None)  # another process on the machine is no fault of what is tested
settings.load_profile("dpar")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then those that run whole stages, so that all workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    # stable: the order within a file and of the other files stays
    items.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), item.path not in slow))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep copies and notes of what was read out of the user's own cache; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        patch.setenv("DPAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory):
    """An empty MLflow store to copy: MLflow takes seconds to make one."""
    from pipeline.tracking import store

    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect(root)
    return root / "mlflow.db"
