"""Results read from a store are those read from a folder."""

from __future__ import annotations

import gc

import pandas as pd
import pytest
from pyarrow import fs

from analysis.report.page import report_html
from analysis.results.load import Results, load
from analysis.results.messages import ResultsError
from analysis.results.parquet import write_parquet
from analysis.tables.paper import write_tables
from trainables.results.schema import EVALUATION_COLUMNS


def upload(folder, url: str) -> None:
    """Bring a folder to a store, as a bucket's owner would: without anything of ours."""
    filesystem, root = fs.FileSystem.from_uri(url if url.startswith("s3") else f"fsspec+{url}")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            if not url.startswith("s3"):
                filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(path.read_bytes())


def below(url: str, name: str) -> str:
    plain, mark, query = url.partition("?")
    return f"{plain}/{name}{mark}{query}"


def same(a: Results, b: Results) -> bool:
    pd.testing.assert_frame_equal(a.trials, b.trials)
    pd.testing.assert_frame_equal(a.epochs, b.epochs)
    pd.testing.assert_frame_equal(a.bench, b.bench)
    return a.manifests == b.manifests and a.studies == b.studies


@pytest.fixture
def filled(synthetic, store_url):
    """A study's folder and its URL."""
    folder = synthetic(24)
    write_parquet(
        [{"study": "synthetic", "trial_id": "00000", "metric": "fid", "value": 1.5}],
        EVALUATION_COLUMNS, folder / "evaluations.parquet",
    )  # fmt: skip
    (folder / "models").mkdir()
    (folder / "models" / "00000.pt").write_bytes(b"large")
    url = below(store_url, "synthetic")
    upload(folder, url)
    return folder, url


def test_a_url_gives_what_the_folder_gives(filled, tmp_path):
    folder, url = filled
    here, there = load(folder), load(url)
    assert same(here, there)
    for trial_id in ("00000", "00013"):
        signals = there.signals("synthetic", trial_id)
        assert signals is not None
        pd.testing.assert_frame_equal(signals, here.signals("synthetic", trial_id))
        grid = there.sample_grid("synthetic", trial_id, "buffer")
        assert grid is not None and grid.read_bytes() == here.sample_grid("synthetic", trial_id, "buffer").read_bytes()
    assert there.signals("synthetic", "no") is None and there.sample_grid("synthetic", "00000", "end") is None
    assert not (there.folders["synthetic"] / "models").exists()
    names = [p.name for p in write_tables(here, tmp_path / "here")]
    assert [p.name for p in write_tables(there, tmp_path / "there")] == names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_the_report_of_a_url_is_that_of_the_folder(filled):
    folder, url = filled
    assert report_html(load(url)) == report_html(load(folder))


def test_a_part_of_the_results_still_brings_its_files(filled):
    folder, url = filled
    above, mark, query = url.partition("?")
    for place in (url, above.rpartition("/")[0] + mark + query):
        part = load(place).of("synthetic")
        gc.collect()  # the whole is gone; its copy must not be
        signals = part.signals("synthetic", "00001")
        assert signals is not None and part.folders["synthetic"].is_dir()
        pd.testing.assert_frame_equal(signals, load(folder).signals("synthetic", "00001"))
        assert (part.folders["synthetic"] / "trials.parquet").is_file()


def test_the_copy_goes_with_the_results(filled):
    results = load(filled[1])
    copy = results.folders["synthetic"].parent
    assert copy.is_dir()
    del results
    gc.collect()
    assert not copy.exists()


def test_several_studies_below_a_url_and_beside_folders(study, row, store_url, tmp_path):
    a, b = study([row("t1")], name="a"), study([row("t2", "diverged")], name="b")
    upload(a, below(store_url, "a"))
    upload(b, below(store_url, "b"))
    assert same(load(store_url), load(tmp_path))
    assert load(store_url, below(store_url, "a"), store_url).studies == ["a", "b"]  # each once
    mixed = load(a, store_url)
    assert mixed.studies == ["a", "b"]  # the store's is a copy of the folder's: its trials are no replicates
    assert mixed.folders["a"] == a
    assert any("/a: the same 1 trial as " in note for note in mixed.notes)


def test_one_name_at_two_end_points_is_two_places(study, row, s3):
    url = s3.bucket()
    upload(study([row("t1")], name="a"), below(url, "a"))
    other = url.replace("127.0.0.1", "localhost")
    results = load(below(url, "a"), below(other, "a"))  # both are read, and hold the same
    assert [note.partition("; ")[0].endswith("/a") for note in results.notes if "the same 1 trial as" in note] == [True]


@pytest.mark.parametrize("missing", ["manifest.json", "trials.parquet", "epochs.parquet"])
def test_what_is_missing_is_named_by_its_url(study, row, store_url, missing):
    folder = study([row("t1")], name="a")
    (folder / missing).unlink()
    url = below(store_url, "a")
    upload(folder, url)
    with pytest.raises(ResultsError) as error:
        load(url)
    assert f"{url.partition('?')[0]}/{missing}: no such file" in str(error.value)
    assert "/tmp" not in str(error.value) and "\n" not in str(error.value)


def test_half_a_table_is_refused_by_its_url(study, row, memory_url):
    folder = study([row("t1")], name="a")
    (folder / "trials.parquet").write_bytes((folder / "trials.parquet").read_bytes()[:-20])
    upload(folder, below(memory_url, "a"))
    with pytest.raises(ResultsError, match=rf"^{memory_url}/a/trials.parquet: not a readable Parquet file"):
        load(below(memory_url, "a"))


def test_an_empty_place_and_an_unknown_scheme(store_url):
    with pytest.raises(ResultsError, match="no such folder") as error:
        load(below(store_url, "nothing"))
    assert store_url.partition("?")[0] in str(error.value)
    with pytest.raises(ResultsError, match=r"^nonsense://x/y: cannot be opened") as error:
        load("nonsense://x/y")
    assert "\n" not in str(error.value)
    with pytest.raises(ResultsError, match="expected the URL"):
        load("memory://")


def test_a_foreign_name_cannot_leave_the_copy(study, row, s3, tmp_path):
    boto3 = pytest.importorskip("boto3")
    url = below(s3.bucket(), "a")
    upload(study([row("t1")], name="a"), url)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}", region_name="us-east-1")
    bucket = url.removeprefix("s3://").split("/")[0]
    client.put_object(Bucket=bucket, Key="a/figures/../../../evil", Body=b"evil")
    with pytest.raises(ResultsError, match=r"evil' is refused"):
        load(url)
    upload(study([row("t1")], name="b"), below(url, "b"))
    assert load(below(url, "b")).signals("b", "../../t1") is None


@pytest.mark.parametrize(
    "url", ["s3://KEYID77:hush%2Fhush@bucket/a?region=r&scheme=x", "s3://KEYID77:hush/hush@bucket/a", "odd://u77:hushhush@b/a"]
)  # fmt: skip
def test_messages_hold_no_credentials(monkeypatch, url):
    class Refuses:
        @staticmethod
        def from_uri(uri):
            raise OSError(f"cannot open {uri} as KEYID77, u77 with hush/hush or hushhush")

    monkeypatch.setattr("trainables.results.store.fs.FileSystem", Refuses)
    with pytest.raises(ResultsError) as error:
        load(url)
    text = str(error.value)
    assert "KEYID77:" not in text and ":hush" not in text and "%2F" not in text
    assert text.startswith(url.partition("://")[0] + "://b") and "/a: cannot be opened" in text
