"""What all tests share."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.paths import ROOT

LONGEST = ("test_smoke.py", "test_fit.py", "test_training_stages.py", "test_faults.py")

# The same examples every time: what nobody has seen before belongs into `make fuzz`. Another process on the machine is no
# fault of what is tested, and the first text in a fresh clone waits for the table of characters that hypothesis makes.
settings.register_profile(
    "dpar",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dpar")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then those that run whole stages, so that all workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    # stable: the order within a file and of the other files stays
    items.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), item.path not in slow))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin with the same random numbers, whichever tests ran before in the process; fixtures come after this."""
    torch.manual_seed(0)


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
