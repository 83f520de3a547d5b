"""Markdown and LaTeX of the tables."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from analysis.tables.paper import ROWS, build_tables
from analysis.tables.registry import NOTHING, Display, ranges, spread_text, without
from analysis.tables.render import (
    csv_text,
    display,
    escape_latex,
    html_page,
    latex,
    markdown,
)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50% of a_b & c#d", r"50\% of a\_b \& c\#d"),
        ("α=1, ρ, σ, λ ± 2", r"$\alpha$=1, $\rho$, $\sigma$, $\lambda$ $\pm$ 2"),
        ("|B| {x} $ ^ ~ \\", r"$|$B$|$ \{x\} \$ \textasciicircum{} \textasciitilde{} \textbackslash{}"),
        ("a – b", "a -- b"),
        ("[0, 1]", "{[}0, 1{]}"),
        ("é", "?"),
    ],
)
def test_latex_escapes(text, escaped):
    assert escape_latex(text) == escaped


@pytest.fixture
def tables(make_results, paper_row):
    trials = [
        paper_row("t1", fid_buffer_best=21.0, isc_buffer_best=7.0, reinit_probability=0.2, hardware="A_B & 50% #1"),
        paper_row("t2", "diverged", seed=1, fid_buffer_best=25.0),
        paper_row("t3", "diverged", seed=2, fid_buffer_best=25.0),
    ]
    return build_tables(make_results(trials))


def test_latex_is_balanced_and_every_row_has_every_cell(tables):
    for name in ROWS:
        text = latex(name, tables[name])
        assert text.isascii()
        plain = text.replace(r"\{", "").replace(r"\}", "")
        assert plain.count("{") == plain.count("}")
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
        assert columns is not None and (len(columns[1]) <= 8 or r"\begin{sidewaystable}" in text)
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
        lines = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert len(lines) == ROWS[name] + 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns[1]) - 1}
        comment, _, code = text.partition("\n")
        assert re.fullmatch(r"% Needs \\usepackage\{booktabs,[a-z,]+\}", comment)
        assert not re.search(r"(?<!\\)[%#]", code)
        assert not re.search(r"(?<!\\)_", code.replace(r"\label{tab:", ""))
        assert text.count(r"\begin{") == text.count(r"\end{")


def test_markdown_rows_have_every_cell(tables):
    for name, frame in tables.items():
        shown = display(name, frame)
        lines = [line for line in markdown(name, frame).splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(shown.header) + 1}
        groups = sum(bool(heading) for heading, _ in shown.groups)
        assert len(lines) == 2 + groups + len(frame)


def test_diverged_values_are_starred_and_explained(tables):
    shown = display("table_1", tables["table_1"])
    row = next(r for r in shown.rows if r[0] == "M-EBM(K=5)")
    cells = dict(zip(shown.header, row, strict=True))
    assert cells["FID published"] == "22.7"
    # t1 differs from the paper in rho, so the nearest setting is that of the two diverged trials.
    assert cells["FID measured"] == "25.00 ± 0.00 (2)*"
    assert cells["Diverged"] == "2/2 [0.34, 1.00]"
    assert cells["Comparable"].startswith("yes [")
    assert shown.rows[0][:4] == ["M-EBM(K=1)", "6.02*", "35.7*", NOTHING]
    assert shown.notes[-1] == "Left out, with nothing in them: IS measured."
    assert shown.notes[0] == "* diverged; best value before it diverged."
    assert any("of 2 settings with this method and K" in note for note in shown.notes)


def test_a_table_without_anything_measured_has_no_measured_column_and_says_so():
    for name, frame in build_tables(None).items():
        if name not in ("settings", "table_5"):
            shown = display(name, frame)
            assert not [h for h in shown.header if "measured" in h or h in ("Diverged", "Comparable", "Hardware")]
            assert shown.notes[-1].startswith("Left out, with nothing in them: ")
            assert "measured" in shown.notes[-1] and len(shown.rows) == ROWS[name]
    assert "Measured" not in display("table_5", build_tables(None)["table_5"]).header


def test_what_has_nothing_in_it_is_left_out_and_named():
    table = Display("c", ["a", "b", "c", "d"], [("x", [["1", "—", "3", "0"]]), ("y", [["2", "—", "—", "—"]])], ["n"])
    shown = without(table)
    assert (shown.header, shown.groups) == (["a", "c", "d"], [("x", [["1", "3", "0"]])])
    assert shown.notes == ["n", "Left out, with nothing in them: b, 1 row."]
    full = Display("c", ["a", "b"], [("", [["1", "2"]])], ["n"])
    assert without(full) is full
    nothing = Display("c", ["a", "b"], [("", [])], ["n"])
    assert without(nothing) is nothing
    zeros = without(Display("c", ["a", "b", "d"], [("", [["1", "0", "—"]])], []), {"b": "0"})
    assert (zeros.header, zeros.notes) == (["a", "d"], ["Left out, with nothing but 0: b."])


def test_a_setting_has_a_name_in_words_in_latex_and_its_identifier_elsewhere(make_results, row):
    trials = [
        row(f"t{i}", step_size=a, initial=p0, setting_id=f"c0ffee{i}00")
        for i, (a, p0) in enumerate([(0.5, "uniform"), (1.0, "gaussian"), (1.00001, "gaussian")])
    ]
    table = build_tables(make_results(trials))["settings"]
    text = latex("settings", table)
    assert "c0ffee" not in text and "c0ffee000" in markdown("settings", table)
    assert "p0 uniform, $\\alpha$ 0.5 & 1 &" in text or "$\\alpha$ 0.5, p0 uniform & 1 &" in text
    names = [line.partition(" & ")[0] for line in text.splitlines() if " & 1 & " in line]
    assert len(set(names)) == 3 and names[2] == f"{names[1]} (2)"
    alone = latex("settings", build_tables(make_results(trials[:1]))["settings"])
    assert "c0ffee" not in alone and "as below & 1 &" in alone


def test_a_note_on_several_rows_is_printed_once(tables):
    notes = display("table_4", tables["table_4"]).notes
    (note,) = [n for n in notes if n.endswith("no official IS and FID reported.")]
    assert note.startswith("JEM(K=20), JEM(K=30), ")


def test_many_values_of_a_hyperparameter_are_shown_as_their_range(make_results, row):
    def measured(n):
        trials = [row(f"t{i}", step_size=0.12345 * (i + 1), setting_id=str(i)) for i in range(n)]
        rows = display("table_5", build_tables(make_results(trials))["table_5"]).rows
        return next(r for r in rows if r[1] == "α")[3]

    assert measured(2) == "0.12345, 0.2469"
    assert measured(6) == "0.123 to 0.741 (6 values)"


def test_trials_are_named_below_a_table_but_not_in_latex(make_results, paper_row):
    scored = [paper_row(f"t{i}", seed=i, fid_buffer_best=20.0 + i) for i in (1, 2)]
    tables = build_tables(make_results([*scored, paper_row("t3", seed=3, isc_buffer_best=7.0)]))
    line = "M-EBM(K=5): demo/t1–t3; IS of demo/t3; FID of demo/t1, demo/t2"
    assert display("table_1", tables["table_1"]).trials == [line]
    assert f"\n- {line}\n" in markdown("table_1", tables["table_1"])
    assert f"<li>{line}</li>" in html_page("table_1", tables["table_1"])
    assert "demo/t" not in latex("table_1", tables["table_1"])
    assert display("table_5", tables["table_5"]).trials[0].endswith(": demo/t1–t3")
    assert display("table_1", build_tables(None)["table_1"]).trials == []


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ("s/t0001, s/t0002, s/t0003, s/t0005", "s/t0001–t0003, s/t0005"),
        ("s/t0001, s/t0002", "s/t0001, s/t0002"),
        ("s/t0009, s/t0010, s/t0011", "s/t0009–t0011"),
        ("s/9, s/10, s/11, s/12", "s/9, s/10–12"),
        ("a/t1, b/t2, b/t3", "a/t1, b/t2, b/t3"),
        ("bench/x, y", "bench/x, y"),
    ],
)
def test_runs_of_ids(ids, shown):
    assert ranges(ids) == shown


def test_a_comparable_row_says_what_agrees(make_results, paper_row):
    table = build_tables(make_results([paper_row("t1", fid_buffer_best=21.0)]))["table_1"]
    shown = display("table_1", table)
    (row,) = [r for r in shown.rows if r[0] == "M-EBM(K=5)"]
    assert row[-1] == "yes [1]"
    assert any(note.startswith("[1] settings as published, images of the data set's own files") for note in shown.notes)


def test_spread_text():
    assert spread_text(1.234, 0.5, 3, 2) == "1.23 ± 0.50 (3)"
    assert spread_text(1.0, None, 1, 1) == "1.0 (1)"
    assert spread_text(None, None, 0, 1) == NOTHING


def test_csv_has_every_row_and_every_number(tables):
    for frame in tables.values():
        rows = list(csv.DictReader(io.StringIO(csv_text(frame))))
        assert len(rows) == len(frame)
        assert list(rows[0]) == list(frame.columns)
    fids = [r["fid_mean"] for r in csv.DictReader(io.StringIO(csv_text(tables["table_1"])))]
    assert [f for f in fids if f] == ["25.0"]


def test_html_has_every_cell_and_escapes_text(tables):
    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows, self.open = [], False

        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                self.rows.append([])
            self.open = tag in ("td", "th")
            if self.open:
                self.rows[-1].append("")

        def handle_data(self, data):
            if self.open:
                self.rows[-1][-1] += data.rstrip("\n")

        def handle_endtag(self, tag):
            self.open = self.open and tag not in ("td", "th")

    for name, frame in tables.items():
        shown = display(name, frame)
        page = html_page(name, frame)
        parser = Cells()
        parser.feed(page)
        assert [r for r in parser.rows if len(r) == len(shown.header)] == [shown.header, *shown.rows]
        assert "<li>" in page or not shown.notes
    odd = html_page("study_odd", tables["settings"].assign(study="<b> & co"))
    assert odd.count("Settings of the study &lt;b&gt; &amp; co") == 2
    assert "<b>" not in odd


def wide_and_long(make_results, row, paper_row, settings):
    """Tables of many settings of many fields, and of every number of Table 3."""
    fields = [
        {"step_size": 0.1 * i + 0.1, "sampling_steps": i % 7 + 1, "buffer_size": 1000 * (i % 3 + 1)}
        for i in range(settings)
    ]
    trials = [row(f"t{i}", setting_id=f"s{i}", **of) for i, of in enumerate(fields)]
    scores = {"fid_buffer_best": 21.0, "isc_buffer_best": 7.0, "accuracy_best": 0.9}
    trials += [paper_row(f"u{i}", seed=i, method="m-jem", **scores) for i in range(2)]
    return build_tables(make_results(trials))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [3, 80])
def test_latex_compiles_with_the_packages_it_names(tables, make_results, row, paper_row, tmp_path, settings):
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("no LaTeX")
    made = {
        **{f"a_{n}": (n, f) for n, f in tables.items()},
        **{f"c_{n}": (n, f) for n, f in build_tables(None).items()},
    }
    more = wide_and_long(make_results, row, paper_row, settings)
    made = {n: table for n, table in made.items() if settings == 3} | {f"b_{n}": (n, f) for n, f in more.items()}
    kinds = set()
    for stem, (name, frame) in made.items():
        text = latex(name, frame)
        kinds |= set(re.findall(r"\\begin\{(table|sidewaystable|longtable|landscape)\}", text))
        needs = re.match(r"% Needs (\\usepackage\{[a-z,]+\})\n", text)
        assert needs is not None
        head = rf"\documentclass{{article}}\usepackage[margin=1in]{{geometry}}{needs[1]}"
        (tmp_path / f"{stem}.tex").write_text(f"{head}\n\\begin{{document}}\n{text}\n\\end{{document}}\n")
        command = [program, "-interaction=nonstopmode", "-halt-on-error", f"{stem}.tex"]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert out.returncode == 0, (stem, out.stdout[-2000:])
        assert (tmp_path / f"{stem}.pdf").is_file()
        assert not re.search(
            r"Overfull \\hbox|Float too large|LaTeX Warning: (?!Label|There were|Reference)", out.stdout
        ), (
            stem,
            out.stdout[-3000:],
        )
    assert kinds >= ({"table", "sidewaystable"} if settings == 3 else {"longtable"})
