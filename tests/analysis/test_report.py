"""The report: one file, offline, small, also of empty and half-done studies."""

import json
import re

import pytest

from analysis.load import Results, load, records, write_parquet
from analysis.report import cut_off, messages, report_html, shown_width, write_report
from analysis.tables import build_tables
from trainables.schema import EVALUATION_COLUMNS


def without_plotly(page: str) -> str:
    """The page without the library: its longest script."""
    return page.replace(max(re.findall(r"<script>(.*?)</script>", page, flags=re.S), key=len), "")


@pytest.mark.parametrize("n", [0, 1, 60])
def test_renders_whatever_is_there(synthetic, tmp_path, n):
    results = load(synthetic(n))
    path = write_report(results, tmp_path / "out" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8e6
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert "undefined" not in without_plotly(page).lower()
    for target in set(re.findall(r'href="#([^"]+)"', page)):
        assert f'id="{target}"' in page
    for name, frame in build_tables(results).items():
        if name != "settings":
            section = page.split(f'<h3 id="{name}">')[1].split("<h3")[0].split("</section>")[0]
            rows = re.findall(r"<tr>(?!<th)", section)
            assert len(rows) == len(frame)
    assert page.count('class="plot"') == {0: 0, 1: 4, 60: 7}[n]
    for text in re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S):
        figure = json.loads(text)
        assert figure["data"]
        assert not figure["layout"].get("template")


def test_two_hundred_trials_stay_small(synthetic, tmp_path):
    path = write_report(load(synthetic(200)), tmp_path / "report.html")
    assert path.stat().st_size < 8e6


def test_nothing_is_loaded_from_elsewhere(synthetic):
    page = without_plotly(report_html(load(synthetic(12))))
    assert not re.findall(r"""(?:src|href|url\(|@import)\s*=?\s*["'(]?\s*(?:https?:)?//""", page)
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    assert not re.findall(r"<link|<iframe|fetch\(|XMLHttpRequest", page)


def test_same_results_same_bytes(synthetic):
    results = load(synthetic(12))
    assert report_html(results) == report_html(results)


def test_of_no_study_shows_the_published_tables(study):
    empty = load(study([]))
    page = report_html(Results(empty.trials, empty.epochs, {}, {}))
    assert "No study was given" in page
    assert "M-EBM(K=20)" in page


def test_half_done_study(study, row):
    trials = [
        row("t1", "running", iterations_done=50, seconds=3.0),
        row("t2", "pending", iterations_done=0, seconds=None, train_seconds=None, seconds_per_iteration=None),
    ]
    folder = study(trials)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"planned_trials": 9}))
    assert "0 of 9 planned trials have ended" in report_html(load(folder))


def test_minimal_manifest(study, row):
    folder = study([row("t1")])
    (folder / "manifest.json").write_text('{"schema_version": 1, "study": "bare"}')
    assert "not recorded" in report_html(load(folder))


def test_text_of_a_study_is_escaped(study, row):
    folder = study([row("t1", "failed", message="<script>alert(1)</script>"), row("</script><b>", "diverged")])
    page = without_plotly(report_html(load(folder)))
    assert "<script>alert" not in page
    assert "</script><b>" not in page


def test_diverged_trials_are_listed_with_when_and_why(study, row):
    page = report_html(load(study([row("t1"), row("t77", "diverged", iteration=123), row("t78", "collapsed")])))
    assert "2 trials diverged or collapsed" in page
    line = re.search(r"<tr><td>t77</td>.*?</tr>", page)
    assert line is not None
    assert "<td>123 of 600</td>" in line[0]
    assert "energy gap ran away" in line[0]


def test_every_outcome_is_counted_and_failed_trials_are_listed_with_their_message(study, row):
    trials = [
        row("t1"),
        row("t2", "failed", message="ValueError: no"),
        row("t3", "failed", message="ValueError: no"),
        row("t4", "failed"),
        row("t5", "stopped", iterations_done=70),
        row("t6", "interrupted", iterations_done=0),
        row("t7", "diverged", message="fid_buffer: no weights"),
    ]
    results = load(study(trials))
    rows = records(results.trials)
    assert messages(rows, failed=True) == [
        {"message": "ValueError: no", "trials": ["t2", "t3"]},
        {"message": "no message", "trials": ["t4"]},
    ]
    assert messages(rows, failed=False) == [{"message": "fid_buffer: no weights", "trials": ["t7"]}]
    assert cut_off(rows) == [
        {"outcome": "stopped", "trials": ["t5 (70 of 600)"]},
        {"outcome": "interrupted", "trials": ["t6 (0 of 600)"]},
    ]
    page = without_plotly(report_html(results))
    assert "<li>t2, t3: ValueError: no</li>" in page
    assert "<li>t7: fid_buffer: no weights</li>" in page
    assert "t5 (70 of 600)" in page
    for outcome, count in {"failed": 3, "stopped": 1, "interrupted": 1, "collapsed": 0, "diverged": 1}.items():
        assert f"<span>{outcome}</span><b>{count}</b>" in page
    assert "<span>running</span>" not in page


def test_a_grid_is_enlarged_by_a_whole_number():
    def png(width):
        return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big")

    assert [shown_width(png(w)) for w in (73, 146, 265, 292, 640)] == [292, 292, 265, 292, 640]


def test_several_studies_in_one_report(synthetic):
    page = report_html(load(synthetic(6, name="one"), synthetic(6, name="two")))
    assert 'id="study-0"' in page
    assert 'id="study-1"' in page
    assert page.count("Plotly.react") == 1


def test_scores_of_kept_models_are_shown_with_their_protocol(study, row) -> None:
    folder = study([row("t1")])
    assert "Scores of kept models" not in report_html(load(folder))
    common = {"study": "demo", "trial_id": "t1", "model": "best", "epoch": 4, "method": "m-ebm", "source": "buffer"}
    rows = [
        common
        | {"protocol": "buffer-10k", "metric": "fid", "value": 31.25, "low": 30.0, "high": 32.5, "samples": 9000},
        common | {"protocol": "buffer-10k", "metric": "isc", "remark": "no IS: <nothing>"},
    ]
    write_parquet(rows, EVALUATION_COLUMNS, folder / "evaluations.parquet")
    page = report_html(load(folder))
    assert "Scores of kept models" in page and "31.2" in page and "30 to 32.5" in page and "9000" in page
    assert "no IS: &lt;nothing&gt;" in page
