import fsspec
import pytest

from tests.storage import s3


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3.server() as port:
        yield port


@pytest.fixture
def use(monkeypatch):
    """Has clients, those of processes that are started too, ask a port of this machine."""

    def use(port):
        for name, value in (s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
            monkeypatch.setenv(name, value)
        # A client keeps the endpoint it began with.
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    yield use
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(server, use, tmp_path, monkeypatch, request):
    """The URL of a new bucket; the cache of this user is a directory of the test's own."""
    use(server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = request.node.name.translate(str.maketrans("_[]", "---")).strip("-")[-60:]
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
