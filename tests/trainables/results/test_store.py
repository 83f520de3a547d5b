"""The store behind a study: whole objects or none, names that stay inside, errors without secrets."""

from __future__ import annotations

import gzip
import pickle

import pytest
from pyarrow import fs

from trainables.results import store as storage
from trainables.results.credentials import is_url, shown
from trainables.results.store import (
    NotThereError,
    Store,
    StoreError,
    identity,
    join,
    refuse_credentials,
    split,
)
from trainables.trial.transient_errors import is_transient


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------------------------------------------------- URLs


def test_urls_and_paths_are_told_apart():
    assert is_url("s3://bucket/x") and is_url("memory://x")
    assert not is_url("results/x") and not is_url("C:/x") and not is_url("s3:/bucket")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://KEYID:hush@bucket/a/b?endpoint_override=h:1&secret_key=hush#hush", "s3://bucket/a/b"),
        ("s3://KEYID:hu/sh@bucket/a", "s3://bucket/a"),  # a slash that was not written as %2F
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("hdfs://name:8020/a%40b?user=joe", "hdfs://name:8020/a%40b"),
        ("hdfs://name:12/34@b/x", "hdfs://b/x"),  # a port and a path, or a password
        ("sftp://joe:hush@host/x", "sftp://host/x"),
        ("results/a?b", "results/a?b"),
    ],
)
def test_what_is_shown_of_a_url_holds_no_secret(url, expected):
    assert shown(url) == expected


def test_join_and_split_keep_the_query():
    url = "s3://bucket/studies/?scheme=http&endpoint_override=h:1"
    assert join(url, "my study") == "s3://bucket/studies/my%20study?scheme=http&endpoint_override=h:1"
    above, name = split(join(url, "my study"))
    assert (above, name) == ("s3://bucket/studies?scheme=http&endpoint_override=h:1", "my study")
    with pytest.raises(StoreError, match="expected URL/NAME"):
        split("s3://bucket")


def test_identity_has_the_end_point_and_no_credentials():
    assert identity("s3://A:b@x/y?endpoint_override=h:1&region=r") == identity(
        "s3://x/y/?region=q&endpoint_override=h:1"
    )
    assert (
        identity("s3://x/y?endpoint_override=h:1") != identity("s3://x/y?endpoint_override=h:2") != identity("s3://x/y")
    )


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYID:hushhush@bucket/a", "s3://KEYID:hush/hush@bucket/a", "s3://KEYID:hu?hush@bucket/a",
        "s3://KEYID:hu#hush@bucket/a", "s3://KEYID:1/2hush@bucket/a", "s3://KEYID%3Ahushhush@bucket/a",
        "sftp://joe:hushhush@host/x", "http://hushhush@host/x", "abfs://a/b?client_secret=hushhush",
        "s3://b/a?SECRET%5FKEY=hushhush", "s3://b/a?scheme=http;secret_key=hushhush", "s3://b/a#access_key=hushhush",
        "abfs://c@a/b?sv=1&SIG=hushhush", "s3://b/a?pass%2577ord=hushhush", "s3://b/a?x=1?token=hushhush",
        "s3://b/a?proxy=http%3A%2F%2Fjoe%3Ahushhush%40p", "simplecache::s3://KEYID:hushhush@b/a", "s3://k:hush[hush@b",
        "az://c/b?connection_string=AccountKey%3Dhushhush",
    ],
)  # fmt: skip
def test_secrets_in_urls_are_refused_and_not_repeated(url, environment):
    with pytest.raises(StoreError) as error:
        refuse_credentials(url)
    assert "hush" not in str(error.value) and "KEYID" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a?endpoint_override=127.0.0.1:9000&scheme=http&region=eu&allow_bucket_creation=true", "sftp://joe@host/x",
        "abfs://container@account.dfs.core.windows.net/a", "gs://anonymous@bucket/a?retry_limit_seconds=3",
        "hdfs://name:8020/a?user=joe", "s3://bucket/a@b/c", "memory://x", "file:///data/x%40y:z",
    ],
)  # fmt: skip
def test_urls_without_secrets_stay_as_they_are(url):
    assert refuse_credentials(url) == url


def test_errors_of_a_file_system_lose_their_secrets(monkeypatch):
    def refuse(uri):
        raise OSError(f"cannot use {uri} as KEYID77 with hu/sh/hush\nand more")

    monkeypatch.setattr(storage, "open_filesystem", refuse)
    with pytest.raises(StoreError) as error:
        Store("s3://KEYID77:hu%2Fsh%2Fhush@bucket/a").exists("x")
    text = str(error.value)
    assert text.startswith("s3://bucket/a: cannot be opened") and "\n" not in text
    assert "KEYID77" not in text and "hush" not in text
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_an_error_of_a_store_may_pass_and_reaches_the_driver_as_it_is():
    error = pickle.loads(pickle.dumps(NotThereError("s3://b/x: no cannot be read (gone)")))
    assert isinstance(error, StoreError) and str(error) == "s3://b/x: no cannot be read (gone)"
    assert is_transient(StoreError("away"))


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(StoreError) as error:
        Store("nonsense://x/y").exists("z")
    assert str(error.value).startswith("nonsense://x/y: cannot be opened") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- objects


def test_what_was_put_is_got(store_place, tmp_path):
    store = Store(store_place)
    data = bytes(range(256)) * 100
    store.put(write(tmp_path / "a", data), "x/a.bin")
    store.put(write(tmp_path / "e", b""), "empty")
    store.put(write(tmp_path / "z", gzip.compress(data, mtime=0)), "z.gz")
    store.put_bytes(b"short", "x/b")
    assert store.read_bytes("x/a.bin") == data
    assert store.read_bytes("z.gz") == gzip.compress(data, mtime=0)  # not unpacked, not packed twice
    store.get("x/a.bin", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == data
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["copy"]
    assert {n: e.size for n, e in store.list().items()} == {
        "empty": 0, "x/a.bin": len(data), "x/b": 5, "z.gz": len(gzip.compress(data, mtime=0))
    }  # fmt: skip
    assert store.list()["x/b"].size == 5 and "nothing" not in store.list()
    assert store.exists("x") and store.exists("x/b") and not store.exists("y")
    store.put_bytes(b"longer than before", "x/b")
    assert store.read_bytes("x/b") == b"longer than before"


def test_a_file_that_grows_is_put_up_to_a_size(store_place, tmp_path):
    store = Store(store_place)
    path = write(tmp_path / "log", b"one\ntwo\nthr")
    store.put(path, "log", size=8)
    assert store.read_bytes("log") == b"one\ntwo\n"
    with pytest.raises(OSError, match="ended 1 bytes before its end"):
        store.put(path, "log", size=12)
    assert store.read_bytes("log") == b"one\ntwo\n"


def test_large_files_go_in_pieces(store_place, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_AT_ONCE", 10)
    monkeypatch.setattr(storage, "_PIECE", 6 * 2**20)
    data = bytes(range(256)) * 2**16  # 16 MiB
    store = Store(store_place)
    store.put(write(tmp_path / "a", data), "a")
    store.get("a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_a_disk_that_fails_leaves_no_half_object(store_place, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_AT_ONCE", 10)
    monkeypatch.setattr(storage, "_PIECE", 4)
    path = write(tmp_path / "a", b"0123456789ab")
    store = Store(store_place)
    with pytest.raises(StoreError, match="ended 8 bytes before its end"):
        store.put(path, "a", size=20)
    assert not store.exists("a") and store.list() == {}


def test_listing_skips_and_folders(store_place):
    store = Store(store_place)
    assert store.list() == {} and store.folders() == ()
    for name in ("tune/run-001/t1/c/a", "tune/run-002/t1/c/a", "models/m", "top", "deep/a/b/c"):
        store.put_bytes(b"x", name)
    assert list(store.list(skip=("tune", "models"))) == ["deep/a/b/c", "top"]
    assert list(store.list("deep")) == ["deep/a/b/c"]
    assert store.folders("tune") == ("run-001", "run-002")
    assert store.folders() == ("deep", "models", "tune")


def test_deleting(store_place):
    store = Store(store_place)
    store.put_bytes(b"2", "b")
    store.delete("b")
    store.delete("b")
    assert not store.exists("b")
    for name in ("f/a", "f/g/b", "fa"):
        store.put_bytes(b"", name)
    store.delete("f")
    store.delete("f")
    assert list(store.list()) == ["fa"]


def test_a_folder_comes_whole(store_place, tmp_path):
    store = Store(store_place)
    store.put_bytes(b"1", "tune/c1/trial.pt")
    store.put_bytes(b"2", "tune/c1/sub/x")
    store.put_bytes(b"3", "tune/c10/trial.pt")
    write(tmp_path / "c" / "old", b"old")
    store.get_folder("tune/c1", tmp_path / "c")
    assert {p.relative_to(tmp_path / "c").as_posix() for p in (tmp_path / "c").rglob("*") if p.is_file()} == {
        "trial.pt", "sub/x"
    }  # fmt: skip
    with pytest.raises(NotThereError, match="no such folder"):
        store.get_folder("tune/c2", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_what_is_not_there_is_said_as_such(store_place, tmp_path):
    store = Store(store_place)
    for call in (lambda: store.read_bytes("no"), lambda: store.get("no", tmp_path / "no")):
        with pytest.raises(NotThereError, match="no cannot be read"):
            call()
    assert not (tmp_path / "no").exists()


def test_paths_of_checkpoints_become_names(store_place):
    store = Store(store_place)
    path, filesystem = f"{store.root}/tune", store.filesystem
    filesystem.create_dir(f"{path}/run-001", recursive=True)
    with filesystem.open_output_stream(f"{path}/run-001/x", compression=None) as stream:
        stream.write(b"1")
    assert store.name_of(f"{path}/run-001/x") == "tune/run-001/x"
    assert store.read_bytes("tune/run-001/x") == b"1"
    assert store.name_of("/elsewhere/x") is None and store.name_of(store.root) is None


def test_a_store_travels_to_a_worker(store_place):
    store = Store(store_place)
    store.put_bytes(b"1", "a")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "", ".", "a/./b", "..\\x", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    store = Store(tmp_path / "store")
    write(tmp_path / "here", b"1")
    for call in (
        lambda: store.put(tmp_path / "here", name),
        lambda: store.get(name, tmp_path / "there"),
        lambda: store.read_bytes(name),
        lambda: store.delete(name),
        lambda: store.get_folder(name, tmp_path / "there"),
    ):
        with pytest.raises(StoreError, match="refused"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]


def test_foreign_objects_with_dots_are_refused(s3, tmp_path):
    boto3 = pytest.importorskip("boto3")
    url = s3.bucket().replace("?", "/studies?")
    store = Store(url)
    store.put_bytes(b"1", "tune/c/a")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}", region_name="us-east-1")
    client.put_object(Bucket=store.root.split("/")[0], Key="studies/tune/c/../../../../evil", Body=b"evil")
    with pytest.raises(StoreError, match=r"evil' is refused"):
        store.list()
    with pytest.raises(StoreError, match=r"evil' is refused"):
        store.get_folder("tune/c", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.rglob("*evil*"))


# --------------------------------------------------------------------------------------------------- half uploads


def test_an_upload_that_breaks_off_leaves_what_was_there(memory_url, breakable, tmp_path):
    store, faults = breakable(memory_url)
    store.put_bytes(b"whole", "a")
    faults.writes = 3
    with pytest.raises(StoreError, match=r"a cannot be written .*connection was reset"):
        store.put(write(tmp_path / "new", b"another one"), "a")
    faults.writes = None
    assert store.read_bytes("a") == b"whole"
    assert list(store.list()) == ["a"]
    everything = store.filesystem.get_file_info(fs.FileSelector(store.root, recursive=True))
    assert [i.base_name for i in everything] == ["a"]  # nor is the half left behind


def test_an_upload_whose_driver_was_killed_is_not_listed(memory_url):
    store = Store(memory_url)
    store.put_bytes(b"1", "x/a")
    with store.filesystem.open_output_stream(f"{store.root}/x/.a.0123abcd.part", compression=None) as stream:
        stream.write(b"hal")
    assert list(store.list()) == ["x/a"]


def test_where_a_move_does_not_replace_it_still_does(memory_url, monkeypatch):
    store = Store(memory_url)
    store.put_bytes(b"1", "a")
    handler, moves = store.filesystem.handler, []
    move = handler.fs.mv

    def strict(source, target, **options):
        moves.append(target)
        if handler.fs.exists(target):
            raise FileExistsError(target)
        return move(source, target, **options)

    monkeypatch.setattr(handler.fs, "mv", strict)
    store.put_bytes(b"2", "a")
    assert store.read_bytes("a") == b"2" and len(moves) == 2


def test_a_download_that_is_cut_short_is_no_file(memory_url, tmp_path, monkeypatch):
    store = Store(memory_url)
    store.put_bytes(b"0123456789", "a")
    write(tmp_path / "a", b"before")

    class Short:
        def __init__(self, data):
            self.data = data

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def size(self):
            return 10

        def read(self, _n):
            data, self.data = self.data, b""
            return data

    class Opened:
        def open_input_file(self, _path):
            return Short(b"0123")

    store.__dict__["_opened"] = (Opened(), "root")
    with pytest.raises(StoreError, match="4 of 10 bytes came"):
        store.get("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
