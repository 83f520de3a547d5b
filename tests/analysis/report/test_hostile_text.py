"""Texts that a stranger wrote into a study's files, in what other programs open: tables, the report, figures."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re

import pandas as pd
import pytest

from analysis.figures.export import export_figures
from analysis.report.page import report_html
from analysis.results.labels import cell, markup, printable
from analysis.results.load import load
from analysis.tables.paper import write_tables
from analysis.tables.render import csv_text, escape_latex

STEERING = "\x1b]52;c;ZQ==\x07\x9b31m\u202egnp\u2066\u2028\x00"
PLAIN = (
    """=HYPERLINK("http://e")</script><script>alert(1)</script><a href="javascript:alert(2)">a</a><img src=x onerror=b>"""
    r"""|\`$x$&{}%#_^~[y](javascript:c) \input{/etc/passwd} \write18{d}"""
)
HOSTILE = f"{PLAIN}{STEERING}\n| row | of its own |\r\n=cmd|' /C calc'!A0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"), ("+1+1", "'+1+1"), ("-1+1", "'-1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("\t=1", "'=1"),
        ("\r=1", "'=1"), ("\n=1", "'=1"), (" =1", "' =1"), ("＝1", "'＝1"), ("-", "'-"),
        ("-1.5", "-1.5"), ("+2e-3", "+2e-3"), ("-inf", "-inf"), ("", ""), ("a=1", "a=1"), ("1-2", "1-2"), ("é", "é"),
        ("a\r\nb", "a b"), ("\x1b[31m", r"\x1b[31m"),
    ],
)  # fmt: skip
def test_a_cell_is_one_line_and_no_formula(text, shown):
    assert cell(text) == shown


def test_a_csv_has_a_line_a_row_and_its_numbers():
    frame = pd.DataFrame({"=name": [HOSTILE, None, "plain"], "value": [-1.5, float("nan"), 2.0], "n": [-1, 2, 3]})
    text = csv_text(frame)
    assert text.count("\n") == 4
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["'=name", "value", "n"]
    assert rows[1][0].startswith("'=HYPERLINK")
    assert [row[1:] for row in rows[1:]] == [["-1.5", "-1"], ["", "2"], ["2.0", "3"]]
    assert [row[0] for row in rows[2:]] == ["", "plain"]


@pytest.mark.parametrize("text", [HOSTILE, PLAIN])
def test_tables_keep_their_form(study, row, tmp_path, text):
    values = {"network": text, "hardware": text, "fd_buffer_protocol": text, "norm": PLAIN, "fd_buffer_best": 1.0}
    folder = study([row("t1", **values), row("t2", "diverged", **values)])
    out = tmp_path / "tables"
    for path in write_tables(load(folder), out):
        if path.suffix == ".parquet":
            continue
        written = path.read_text(encoding="utf-8")
        lines = written.split("\n")
        assert all(line.isprintable() for line in lines), path
        if path.suffix == ".csv":
            rows = list(csv.reader(io.StringIO(written)))
            assert len(rows) == len(lines) - 1
            assert not [c for r in rows for c in r if re.match(r"[=+@]|-(?![\d.]|inf)", c)]
        elif path.suffix == ".md":
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
            assert len(bars) == 1, path
            assert not re.search(r"(?<!\\)[<`]", written)
        elif path.suffix == ".html":
            assert "<script" not in written
            assert "<a " not in written
            assert "<img" not in written
        else:
            assert r"\input" not in written
            assert r"\write18" not in written
            assert sum(line.endswith(r"\\") for line in lines) == written.count(r"\\")


@pytest.mark.parametrize("character", ["\\", "{", "}", "$", "&", "#", "^", "_", "~", "%"])
def test_latex_has_no_character_with_a_meaning(character):
    assert character not in re.sub(r"\\textbackslash\{\}|\\text\w+\{\}|\\[&%$#_{}]", "", escape_latex(character))


def test_a_report_runs_and_links_nothing_of_a_study(study, row):
    values = {"network": HOSTILE, "hardware": HOSTILE, "fd_buffer_protocol": HOSTILE, "fd_buffer_best": 1.0}
    folder = study([row("t1", "failed", message=HOSTILE), row("t2", "diverged", **values), row("t3", **values)])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"description": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = report_html(load(folder))
    before, start, rest = page.partition('<script type="text/plain" id="plotly">')
    page = before + start + rest[rest.index("</script>") :]
    assert "alert(1)" in page  # it is shown
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "href=javascript" not in page.replace('"', "")
    assert all(line.isprintable() for line in page.replace("\t", " ").split("\n"))
    for data in re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S):
        assert "<a" not in json.dumps(json.loads(data))
    links = re.findall(r'href="data:([^;]+);base64,([^"]+)"', page)
    assert links
    for kind, text in links:
        raw = base64.b64decode(text)
        content = (gzip.decompress(raw) if kind == "application/gzip" else raw).decode()
        assert not [c for r in csv.reader(io.StringIO(content)) for c in r if c.startswith(("=", "@", "+"))]


def test_a_figure_on_its_own_links_nothing_of_a_study(study, row, tmp_path):
    values = {"network": HOSTILE, "fd_buffer_protocol": HOSTILE, "fd_buffer_best": 1.0, "seconds_per_iteration": 0.1}
    folder = study([row("t1", sampling_steps=1, **values), row("t2", "diverged", sampling_steps=2, **values)])
    out = tmp_path / "figures"
    export_figures(load(folder), out, formats=["html", "json", "csv"])
    assert list(out.glob("*.html"))
    for path in [*out.glob("*.html"), *out.glob("*.json")]:
        written = path.read_text(encoding="utf-8").replace("\\u003c", "<")
        assert "<a href" not in written, path
        assert "<script>alert" not in written, path
        assert "\x1b" not in written


def test_markup_of_ours_stays():
    ours = '<b>t1</b> x<br>y<sub>2</sub><extra>n</extra><span style="color:#0a1b2c">z</span> a < b'
    assert markup(ours) == ours.replace("a < b", "a &lt; b")
    assert markup({"text": ["<a href='x'>y</a>"]}) == {"text": ["&lt;a href='x'>y&lt;/a>"]}
    assert markup('<span style="color:red;position:fixed">') == '&lt;span style="color:red;position:fixed">'
    assert markup("<b onclick=x>") == "&lt;b onclick=x>"


def test_a_text_on_one_line():
    assert printable("a\r\n\tb\x85c\u2028d\x1be\u202ef\ud800") == r"a b c d\x1be\u202ef\ud800"
