"""The report: one file, offline, small, also of empty and half-done studies."""

import base64
import gzip
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.report.page import report_html, shown_width, write_report
from analysis.report.sections import cut_off, messages
from analysis.report.trials import thumbnail, thumbnails
from analysis.results.load import Results, load
from analysis.results.parquet import records, write_parquet
from analysis.tables.paper import build_tables
from trainables.results.schema import EVALUATION_COLUMNS


def without_plotly(page: str) -> str:
    """The page without the library."""
    before, start, rest = page.partition('<script type="text/plain" id="plotly">')
    assert start
    return before + rest.partition("</script>")[2]


@pytest.mark.parametrize("n", [0, 1, 60])
def test_renders_whatever_is_there(synthetic, tmp_path, n):
    results = load(synthetic(n))
    path = write_report(results, tmp_path / "out" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8e6
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert "undefined" not in re.sub(r"<script>.*?</script>", "", without_plotly(page), flags=re.S).lower()
    for target in set(re.findall(r'href="#([^"]+)"', page)):
        assert f'id="{target}"' in page
    for name, frame in build_tables(results).items():
        if name != "settings":
            section = page.split(f'<h4 id="{name}">')[1].split("<h4")[0].split("</section>")[0].split("</table>")[0]
            rows = re.findall(r"<tr>(?!<th)", section)
            assert len(rows) == len(frame)
    assert page.count('class="plot"') == {0: 0, 1: 2, 60: 23}[n]
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
    (folder / "manifest.json").write_text('{"schema_version": 2, "study": "bare"}')
    assert "not recorded" in report_html(load(folder))


def test_text_of_a_study_is_escaped(study, row):
    folder = study([row("t1", "failed", message="<script>alert(1)</script>"), row("</script><b>", "diverged")])
    page = without_plotly(report_html(load(folder)))
    assert "<script>alert" not in page
    assert "</script><b>" not in page


def test_diverged_trials_are_listed_with_when_and_why(study, row):
    page = report_html(load(study([row("t1"), row("t77", "diverged", iteration=123), row("t78", "collapsed")])))
    assert "2 of 3 trials diverged or collapsed" in page
    line = re.search(r'<tr data-study="0" data-trial="t77"><td>t77</td>.*?</tr>', page)
    assert line is not None
    assert '<td data-value="123">123 of 600</td>' in line[0]
    assert "energy gap ran away" in line[0]
    assert '<td data-value="140">140</td>' in line[0], "the alarm"


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
    assert "<span>diverged</span><b>1 of 7</b><span>1 diverged; 1 completed; 1 stopped; 1 interrupted; 3 failed" in page
    status = re.search('<p class="status">(.*?)</p>', page)[1]
    ended = "Not finished: 6 of 7 planned trials have ended"
    assert status == f"{ended}; 3 failed with an error; 2 were cut off by the budget or an interrupt."


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


def downloads(page: str) -> dict[str, pd.DataFrame]:
    """Files that the page offers, by name."""
    found = {}
    for kind, content, file in re.findall(r'href="data:([a-z/]+);base64,([^"]*)" download="([^"]+)"', page):
        data = base64.b64decode(content)
        assert file.endswith({"text/csv": ".csv", "application/gzip": ".csv.gz"}[kind])
        found[file] = pd.read_csv(io.BytesIO(gzip.decompress(data) if file.endswith(".gz") else data))
    return found


def test_every_figure_carries_its_data_and_what_made_it(synthetic):
    results = load(synthetic(60))
    page = without_plotly(report_html(results))
    figures = re.findall(r'<figure class="plot".*?</figure>', page, flags=re.S)
    assert len(figures) == 23
    for figure in figures:
        assert len(downloads(figure)) == 1
        assert re.search(r"<pre[^>]*>results = load\(.*?(analysis\.\w+\.\w+\(|trials\[\[)", figure, flags=re.S)
    files = downloads(page)
    rows = {t["trial_id"]: t for t in records(results.trials)}
    parallel = files["synthetic_parallel.csv"]
    assert [f"{i:05d}" for i in parallel["trial_id"]] == list(rows)
    assert parallel["outcome"].tolist() == [t["outcome"] for t in rows.values()]
    tradeoff = files["synthetic_tradeoff_fd_buffer.csv"]
    assert tradeoff["quality"].tolist() == pytest.approx([t["fd_buffer_best"] for t in rows.values()], rel=1e-6)
    survival = files["synthetic_survival_initial.csv"]
    assert list(survival.columns)[:3] == ["trace", "x", "y"]
    assert survival["y"].between(0, 1).all()
    assert {"training", "anytime"} <= {f.split("_")[1].split(".")[0] for f in files}


def test_what_to_run_and_equal_times_are_in_the_report(synthetic, study, row):
    page = without_plotly(report_html(load(synthetic(60))))
    advice = re.search(r'<dl class="advice">(.*?)</dl>', page, flags=re.S)
    assert advice is not None
    assert "up to 56% may fail" in advice[1]
    assert "FD (buffer) at equal wall time" in page
    assert "Wall time to equal FD (buffer)" in page
    pending = report_html(load(study([row("t1", "pending")])))
    assert '<dl class="advice">' not in pending


def test_reachable_by_keyboard(synthetic):
    page = without_plotly(report_html(load(synthetic(12))))
    assert '<a class="skip" href="#main">' in page
    for box in re.findall(r'<div class="scroll[^>]*>', page):
        assert 'tabindex="0"' in box
    assert not re.search(r"onclick|tabindex=\"[1-9]", page)


def page_data(page: str, name: str) -> dict:
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return json.loads(found[1])


def test_every_trial_is_in_the_table_and_among_the_filters_with_its_setting(synthetic):
    results = load(synthetic(60))
    page = without_plotly(report_html(results))
    trials = records(results.trials)
    table = page.split('id="study-0-trials"')[1].split("</table>")[0]
    assert re.findall(r'data-trial="([^"]+)"', table) == [t["trial_id"] for t in trials]
    known = page_data(page, "trials-data")
    said = ["outcome", "cause", "alarm", "saved"]
    assert [f["field"] for f in known["filters"]] == [*said, "sampling_steps", "initial", "step_size"]
    study = known["studies"][0]
    labels = [label for label, _ in study["fields"]]
    assert labels == ["K", "p0", "α"]
    assert ["network", "conv-16"] in study["common"]
    for t in trials:
        own = study["trials"][t["trial_id"]]
        assert dict(zip(labels, own["values"], strict=True))["K"] == str(t["sampling_steps"])
        chosen = {f["field"]: f["values"][i] for f, i in zip(known["filters"], own["chosen"], strict=True)}
        assert (chosen["outcome"], chosen["initial"]) == (t["outcome"], t["initial"])
        assert chosen["alarm"] == ("no alarm" if t["alarm_iteration"] is None else "alarm")
        assert chosen["saved"] == ("time saved" if t["saved_seconds"] else "nothing saved")
    for field in known["filters"]:
        assert page.count(f'type="checkbox" name="{field["field"]}"') == len(field["values"])


def test_points_and_lines_of_trials_say_whose_they_are(synthetic):
    results = load(synthetic(60))
    ids = set(results.trials["trial_id"])
    page = without_plotly(report_html(results))
    drawn = re.findall(r'<figure class="plot" data-study="0".*?</figure>', page, flags=re.S)
    # two trade-offs, three phase diagrams, two costs, quality over time, training curves, parallel coordinates
    assert len(drawn) == 10
    for figure in drawn:
        data = json.loads(re.search(r'json">(.*?)</script>', figure, flags=re.S)[1])["data"]
        points = [i for trace in data for i in trace.get("ids", [])]
        lines = [trace["meta"]["trial"] for trace in data if "meta" in trace]
        assert set(points) | set(lines) <= ids
        assert len(set(points) | set(lines)) >= 58  # a trial without a value or a time has no point in some
        for trace in data:
            if "ids" in trace:
                assert len(trace["ids"]) == len(trace["x"]) == len(trace["y"])


def test_one_trial_has_nothing_to_filter(synthetic):
    assert 'id="filters"' not in report_html(load(synthetic(1)))


def test_studies_are_filters_where_there_are_several(synthetic):
    page = report_html(load(synthetic(3, name="one"), synthetic(3, name="two")))
    first = page_data(page, "trials-data")["filters"][0]
    assert (first["field"], first["values"]) == ("study", ["one", "two"])


def test_phase_diagrams_over_any_two_varied_fields(synthetic):
    page = without_plotly(report_html(load(synthetic(60))))
    fold = page.split('id="study-0-phase"')[1].split('class="theme-fold"')[0]
    options = re.findall(r"<option>(.*?)</option>", fold.split("</select>")[0])
    assert options[0] == "K and α"
    assert {frozenset(o.split(" and ")) for o in options} == {
        frozenset(p) for p in (("K", "α"), ("K", "p0"), ("α", "p0"))
    }
    assert re.findall(r'data-choice="([^"]+)"', fold) == options


def test_thumbnails_undo_an_enlargement_and_fit_their_budget(synthetic, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "grid.png"
    Image.fromarray(pixels.repeat(4, axis=0).repeat(4, axis=1)).save(path)
    small = Image.open(io.BytesIO(thumbnail(path, 160, None)))
    assert small.size == (30, 20)
    assert np.array_equal(np.asarray(small.convert("RGB")), pixels)
    assert Image.open(io.BytesIO(thumbnail(path, 15, 60))).size == (15, 10)
    (tmp_path / "torn.png").write_bytes(path.read_bytes()[:100])
    assert thumbnail(tmp_path / "torn.png", 160, None) is None
    results = load(synthetic(12))
    whole = thumbnails(results)
    assert list(whole) == [("synthetic", f"{i:05d}") for i in range(12)]
    sizes = [len(base64.b64decode(uri.partition(",")[2])) for _, uri in thumbnails(results, 45_000).values()]
    assert len(sizes) == 12
    assert sum(sizes) <= 45_000 < sum(len(base64.b64decode(uri.partition(",")[2])) for _, uri in whole.values())
    assert 0 < len(thumbnails(results, 5_000)) < 12
