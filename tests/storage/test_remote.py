"""The room for paths by itself, over fsspec's store in memory: nothing in it knows which store it is."""

import time
from pathlib import Path

import fsspec
import pytest

from zamba2_jax.files import write_json
from zamba2_jax.storage import local
from zamba2_jax.storage.local import Mirror, growing_file, local_copy, scratch, write_directory
from zamba2_jax.storage.remote import RemoteDirectory, is_remote, local_files


@pytest.fixture
def remote():
    fsspec.filesystem("memory").store.clear()
    return RemoteDirectory("memory://room/place")


@pytest.fixture
def uploads(monkeypatch):
    """The names of files in the order in which they were uploaded; fails at the name that it is given."""
    upload, names, fatal = RemoteDirectory.upload, [], []

    def noting(self, files):
        for name in files:
            if name in fatal:
                raise OSError("the store is gone")
            upload(self, {name: files[name]})
            names.append(name)

    monkeypatch.setattr(RemoteDirectory, "upload", noting)
    return names, fatal


def fill(directory):
    for name in ("a.txt", "manifest.json", "z/b.txt"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    return 7


def test_what_says_that_a_directory_is_complete_comes_last(remote, uploads):
    names, _ = uploads
    assert write_directory(str(remote), fill, last="manifest.json") == 7
    assert names == ["a.txt", "z/b.txt", "manifest.json"]
    assert remote.sizes() == {"a.txt": 5, "manifest.json": 13, "z/b.txt": 7}
    assert (remote.read("z/b.txt"), remote.read("a.txt", 1, 3)) == (b"z/b.txt", b".t")
    with pytest.raises(FileExistsError, match="memory://room/place is there already"):
        write_directory(str(remote), fill, last="manifest.json")


def test_nothing_is_left_of_a_directory_that_fails(remote, uploads):
    uploads[1].append("z/b.txt")
    with pytest.raises(OSError, match="the store is gone"):
        write_directory(str(remote), fill, last="manifest.json")
    assert remote.sizes() == {}


def test_a_local_copy_is_kept_until_the_remote_one_changes(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("a.json", "b.txt", "c/d.json"):
        remote.write(name, b"old")
    first = local_copy(str(remote), ("*.json",))
    assert sorted(local_files(first)) == ["a.json"]
    assert local_copy(str(remote), ("*.json",)) == first
    remote.write("a.json", b"newer")
    assert (local_copy(str(remote), ("*.json",)) / "a.json").read_bytes() == b"newer"
    assert local_copy(f"{remote}/b.txt", ()).read_bytes() == b"old"
    assert local_copy(tmp_path / "nothing", ()) == tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match="memory://room/nothing: it holds no"):
        local_copy("memory://room/nothing", ("*.json",))


def test_a_mirror_copies_what_changes_and_survives_a_store_that_is_gone(remote, uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MIRROR_SECONDS", 0.01)
    names, fatal = uploads
    (tmp_path / "was there").write_text("")
    with Mirror(tmp_path, remote, last="config.json", leave_out="checkpoints") as mirror:
        fatal.append("metrics.jsonl")
        (tmp_path / "metrics.jsonl").write_text("1\n")
        with pytest.raises(OSError, match="gone"):
            mirror.copy()
        fatal.clear()
        while "metrics.jsonl" not in names:
            time.sleep(0.01)
    names.clear()
    mirror = Mirror(tmp_path, remote, last="config.json", leave_out="checkpoints")
    write_json(tmp_path / "config.json", {})
    (tmp_path / "checkpoints").mkdir()
    for name in (".hidden", "checkpoints/4", "tokenizer.json"):
        (tmp_path / name).write_text("")
    mirror.copy()
    mirror.copy()
    assert names == ["tokenizer.json", "config.json"]


def test_one_process_at_a_time_has_a_place(remote):
    with scratch(str(remote)) as directory:
        (directory / "left").write_text("")
        expected = pytest.raises(BlockingIOError, match="another process of this machine is running in memory://room")
        with expected, scratch(str(remote)):
            pass
    with scratch(str(remote)) as again:
        assert again == directory
        assert not list(again.iterdir())


def test_a_growing_file_goes_on_with_what_is_there(remote):
    for text in ("one\n", "two\n"):
        with growing_file(f"{remote}/out.jsonl", "out.settings") as path:
            with path.open("a") as file:
                file.write(text)
            path.with_name("out.settings").write_text(text)
    assert remote.read("out.jsonl") == b"one\ntwo\n"
    assert remote.read("out.settings") == b"two\n"


@pytest.mark.parametrize("url", ["s4://bucket/a", "nonsense://a"])
def test_a_store_that_is_none_is_named(url):
    with pytest.raises(ValueError, match=f"{url}: expected a local path, s3:// or gs://"):
        RemoteDirectory(url)


def test_a_url_with_too_few_slashes_is_no_local_path():
    for url in ("s3:/bucket/a", "s3:bucket/a", Path("s3://bucket/a")):
        with pytest.raises(ValueError, match=r"s3:/?bucket/a: expected s3://bucket/a, or a local path"):
            is_remote(url)
    assert not is_remote("a:b/c")
