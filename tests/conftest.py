"""What every test needs: a BLAS before MLX, the helpers of `tests/tiny` on the path, models, `--checkpoint`."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Products of tiny models are over before a second thread has woken up: on a busy machine two take five times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flux2_relay.stages  # noqa: F401 - loads a BLAS, which must come before the first import of mlx

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--checkpoint DIR`: oracle tests compare on this folder instead of tiny checkpoints that they make."""
    parser.addoption("--checkpoint", type=Path, help="diffusers-layout folder for tests/oracle")


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not among the tests.

    The program collects it after each model, and looking through all that pytest holds took half the time of a command.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests remember digests in a folder of their own, never in the user's; of files a moment old, too."""
    from flux2_relay.stages import identity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_SETTLED_SECONDS", -1)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("memory")))
        yield


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    """Plain kernels: each compiled one costs half a second of C++ compiler on a CPU."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dev-like checkpoint; not to be written to."""
    from tiny import model

    return model.write_dev(tmp_path_factory.mktemp("models") / "dev")


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint like base Klein; not to be written to."""
    from tiny import model

    return model.write_klein(tmp_path_factory.mktemp("models") / "klein")


@pytest.fixture(params=["dev", "klein"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each of both in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of two shapes with captions; not to be written to."""
    from tiny import model

    return model.write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def encoded_store(dev: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the dev-like project after `relay encode`; to be copied."""
    from tiny.project import Project

    project = Project(tmp_path_factory.mktemp("encoded"), dev, pictures).write()
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    return project.store


@pytest.fixture
def encoded(encoded_store: Path, dev: Path, pictures: Path, tmp_path: Path) -> Callable:
    """Make a dev-like project with all entries in its store, with these changes to the config."""
    from tiny.project import Project

    def make(**changes: dict) -> Project:
        project = Project(tmp_path / f"project{len(os.listdir(tmp_path))}", dev, pictures).write(changes)
        shutil.copytree(encoded_store, project.store)
        return project

    return make
