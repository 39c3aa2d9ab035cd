"""The helpers of these tests on the path, and buckets: an emulator of S3 that is started on this machine."""

import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The emulator's address."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server], of the extra `test`")
    pytest.importorskip("obstore", reason="needs obstore, of the extra `remote`")
    emulator = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    emulator.start()
    yield "http://{}:{}".format(*emulator.get_host_and_port())
    emulator.stop()


@pytest.fixture
def url(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty place in a bucket of its own, and a cache folder of its own."""
    settings = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in {**settings, "ENDPOINT_URL": server}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    bucket = f"b{abs(hash(request.node.nodeid))}"
    with urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT")):
        pass
    return f"s3://{bucket}/some/store.zarr"
