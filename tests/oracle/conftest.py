"""The checkpoints that oracle tests compare on, and the reference models of each."""

from pathlib import Path

import pytest
import torch
from oracle import checkpoints
from oracle.reference import Reference, quiet

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """One thread: the models are so tiny that a second one only waits, 50 times longer on a busy machine."""
    torch.set_num_threads(1)
    quiet()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder carries the marker."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.oracle)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `reference` runs on dev-like and Klein-like, or on `--checkpoint` alone."""
    if "reference" in metafunc.fixturenames:
        given = metafunc.config.getoption("checkpoint")
        metafunc.parametrize("reference", [given] if given else ["dev", "klein"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The reference models of a checkpoint."""
    if isinstance(request.param, Path):
        return Reference(request.param)
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    make = {"dev": checkpoints.dev_like, "klein": checkpoints.klein_like}[request.param]
    return Reference(make(folder, seed=0))
