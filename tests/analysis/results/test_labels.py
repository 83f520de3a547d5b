"""Names of settings: the paper's, and those that a method's own fields bring with their table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from analysis.results import labels
from analysis.results.labels import learn_symbols, symbol
from analysis.results.parquet import arrow_schema
from trainables.results.schema import Column


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(labels, "_SYMBOLS", dict(labels._SYMBOLS))
    yield


def test_an_own_field_has_its_name_without_the_prefix_or_its_symbol():
    assert symbol("sampling_steps") == "K"
    assert symbol("method_args.start_iteration") == "start iteration"
    learn_symbols({"method_args.temperature": "T"})
    assert symbol("method_args.temperature") == "T"


def test_a_strangers_table_names_its_own_fields_alone():
    learn_symbols({"sampling_steps": "X", "method_args.width": "a" * 90 + "\n"})
    assert symbol("sampling_steps") == "K" and symbol("method_args.width") == "a" * 40


def test_a_table_carries_symbols():
    plain = Column("a", "int64", "meaning")
    named = Column("method_args.temperature", "float64", "of the softplus", "K", symbol="T")
    fields = arrow_schema([plain, named])
    assert fields.field("a").metadata == {b"meaning": b"meaning"}
    assert fields.field(named.name).metadata == {b"meaning": b"of the softplus", b"unit": b"K", b"symbol": b"T"}
