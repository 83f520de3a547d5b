"""`mebm bench` on tiny cases: what is timed, what is computed from it, what it leaves, and Table 6 made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from analysis.load import load, read_bench
from analysis.tables import build_tables
from study.bench import SHORT, TABLE6, BenchOptions, cases, parse_methods, planned_windows
from study.cli import cli
from study.errors import UserError, parse_choices
from trainables.cost import iteration_flops
from trainables.methods import build_trial
from trainables.timing import Windows, geometric_mean, kernel_class, peak_flops

CPU = torch.device("cpu")
TINY = ["--dataset", "digits", "--network", "conv-4", "--rounds", "3", "--seconds", "0.001"]


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["bench", *TINY, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], pd.DataFrame, Path]:
    folder = tmp_path_factory.mktemp("bench") / "b"
    output = run("--methods", "m-ebm:2,jem:20,softmax", "--precision", "fp32,bf16", "--profile", "--json",
                 "--out", str(folder))  # fmt: skip
    return json.loads(output.stdout), read_bench(folder / "bench.parquet"), folder


def test_every_case_is_timed_once_and_the_released_loop_beside_it(timed: Any) -> None:
    shown, rows, _ = timed
    names = [(r.method, r.precision, r.implementation) for r in rows.itertuples()]
    assert names == [
        ("m-ebm", "fp32", "package"),
        ("m-ebm", "bf16", "package"),
        ("m-ebm", "fp32", "released-loop"),
        ("jem", "fp32", "package"),
        ("jem", "bf16", "package"),
        ("softmax", "fp32", "package"),
        ("softmax", "bf16", "package"),
    ]
    assert [r["row_id"] for r in shown["rows"]] == list(rows["row_id"])
    assert (rows["seconds_per_iteration"] > 0).all() and (rows["seconds_low"] <= rows["seconds_high"]).all()
    assert set(rows["windows"]) == {3} and set(rows["network"]) == {"conv-4"} and set(rows["threads"]) == {1}
    assert rows["peak_memory_bytes"].isna().all(), "a CPU has no device memory"


def test_ratios_are_of_the_same_run(timed: Any) -> None:
    shown, rows, _ = timed
    over = rows["speedup_over_baseline"]
    assert list(over.notna()) == [True, True, False, False, False, False, False]
    assert shown["speedup_over_baseline"] == pytest.approx((over[0] * over[1]) ** 0.5)
    # Table 6's definition, at the row's own precision; the released loop has no JEM of its own.
    for first, jem in ((0, 3), (1, 4), (5, 3)):
        wanted = rows["seconds_per_iteration"][jem] / rows["seconds_per_iteration"][first]
        assert rows["speedup_over_jem"][first] == pytest.approx(wanted)
    assert rows["speedup_over_jem"][3] == 1 and pd.isna(rows["speedup_over_jem"][2])


def test_rates_follow_from_times_and_counts(timed: Any) -> None:
    shown, rows, _ = timed
    config = build_trial(json.loads(rows["config"][0]))
    assert rows["flops_per_iteration"][0] == iteration_flops(config, (1, 8, 8), 10)
    rate = rows["flops_per_iteration"] / rows["seconds_per_iteration"]
    pd.testing.assert_series_equal(rows["flops_per_second"], rate, check_names=False)
    assert rows["mfu"][1] == pytest.approx(rate[1] / shown["peak_flops_per_second"]["bf16"])
    assert (rows["mfu"] > 0).all()


def test_profile_names_where_the_time_goes(timed: Any) -> None:
    shown, _, folder = timed
    shares = shown["profiles"]["m-ebm K=2 fp32 eager"]
    assert set(shown["profiles"]) == set(json.loads((folder / "profile.json").read_text()))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "convolution and matrix product" in shares and "optimiser" in shares
    assert "norm" not in shares, "the digits' network has none"


def test_rows_are_added_and_what_made_them_is_kept(timed: Any) -> None:
    _, rows, folder = timed
    output = run("--methods", "softmax", "--precision", "fp32", "--no-baseline", "--out", str(folder))
    assert output.exit_code == 0 and "softmax" in output.stdout and str(folder / "bench.parquet") in output.stdout
    after = read_bench(folder / "bench.parquet")
    assert len(after) == len(rows) + 1 and after["bench"].nunique() == 2
    info = json.loads((folder / "bench.json").read_text())
    assert torch.__version__.startswith(info["versions"]["torch"]) and info["hardware"]["cpus"] >= 1
    after.iloc[: len(rows)].to_parquet(folder / "bench.parquet")  # as the other tests found it


def test_table_6_takes_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "bench"
    options = ["--dataset", "cifar10", "--network", "wrn-10-1", "--set", "initial=uniform", "--rounds", "1"]
    methods = ["--methods", "m-ebm:1,jem:20", "--precision", "fp32,bf16", "--no-baseline", "--seconds", "0.001"]
    smaller = ["--set", "batch_size=4", "--set", "label_batch_size=4"]
    result = CliRunner().invoke(cli, ["bench", *options, *methods, *smaller, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    rows, results = read_bench(folder / "bench.parquet"), load(tmp_path / "results")
    assert results.studies == [] and len(results.bench) == 4
    table = build_tables(results)["table_6"].set_index("model")
    row = table.loc["M-EBM(K=1)"]
    assert row["minutes_per_epoch_mean"] == pytest.approx(rows["seconds_per_iteration"][0] * 6.5)
    assert row["runtime_hours_mean"] == pytest.approx(row["minutes_per_epoch_mean"] * 200 / 60)
    assert row["speedup_mean"] == pytest.approx(rows["speedup_over_jem"][0])
    assert row["minutes_per_epoch_published"] == 2.4 and row["trials"] == 1
    assert "network wrn-10-1, paper wrn-28-10" in row["comparable_reason"]
    assert row["trial_ids"] == f"{rows['bench'][0]}/r001"
    assert table.loc["M-EBM(K=2)"]["trials"] == 0
    command = CliRunner().invoke(cli, ["tables", str(folder), "--out", str(tmp_path / "t")])
    assert command.exit_code == 0 and (tmp_path / "t" / "table_6.md").is_file()


def test_methods_are_parsed() -> None:
    assert parse_methods(None, CPU) == SHORT
    assert parse_methods(None, torch.device("cuda")) == TABLE6 == parse_methods("table6", CPU)
    assert parse_methods("m-ebm", CPU) == (("m-ebm", 1), ("m-ebm", 2), ("m-ebm", 5), ("m-ebm", 10))
    assert parse_methods("jem:7, vera,jem:7", CPU) == (("jem", 7), ("vera", None))
    for wrong, said in (
        ("mebm", "did you mean"),
        ("m-ebm:0", "whole number"),
        ("m-ebm:x", "m-ebm:5"),
        (",", "no method"),
    ):
        with pytest.raises(UserError, match=said):
            parse_methods(wrong, CPU)
    assert parse_choices("--precision", "bf16,fp32,bf16", ("fp32", "bf16")) == ("bf16", "fp32")
    with pytest.raises(UserError, match="--precision fp16: must be of fp32, bf16"):
        parse_choices("--precision", "fp16", ("fp32", "bf16"))


def test_what_a_method_cannot_do_is_not_timed_twice() -> None:
    options = BenchOptions(
        methods=(("m-ebm", 1), ("igebm", 2), ("vera", None)),
        network="wrn-10-1",
        precisions=("fp32",),
        executions=("eager", "compiled", "graphed"),
        device=CPU,
        rounds=2,
    )
    found = {name: [c.execution for c in configs] for name, configs in cases(options)}
    assert found == {"m-ebm K=1": ["eager", "compiled"], "igebm K=2": ["eager"], "vera": ["eager"]}
    networks = {name: configs[0].network for name, configs in cases(options)}
    assert networks == {"m-ebm K=1": "wrn-10-1", "igebm K=2": "igebm-128", "vera": "wrn-10-1"}
    assert planned_windows(options) == 2 * (2 + 1 + 1 + 1)  # and the released loop beside M-EBM


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (["--methods", "nope"], "no such method"),
        (["--precision", "fp8"], "must be of fp32, tf32, bf16"),
        (["--set", "sampling_stepz=3"], "unknown trial field"),
        (["--dataset", "cifar11"], "unknown"),
    ):
        result = CliRunner().invoke(cli, ["bench", *TINY, *arguments, "--out", str(tmp_path / "b")])
        assert isinstance(result.exception, UserError) and said in str(result.exception)
        assert not (tmp_path / "b").exists()


def test_windows_and_means() -> None:
    windows = Windows((3.0, 1.0, 2.0), 4, 9.0, None)
    assert windows.median == 2.0 and windows.quartiles == (1.5, 2.5)
    assert Windows((3.0,), 1, 9.0, None).quartiles == (3.0, 3.0)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0) and geometric_mean([]) is None


def test_kernels_have_classes() -> None:
    names = {
        "aten::mkldnn_convolution": "convolution and matrix product",
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution and matrix product",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW": "norm",
        "aten::native_batch_norm_backward": "norm",
        "aten::_fused_sgd_": "optimiser",
        "aten::normal_": "random numbers",
        "aten::copy_": "copy and index",
        "aten::sum": "reduction",
        "triton_poi_fused_leaky_relu_0": "elementwise",
        "something": "other",
    }
    assert {name: kernel_class(name) for name in names} == names


def test_a_matrix_peak_is_a_rate() -> None:
    assert 1e8 < peak_flops(CPU, "fp32", size=128, repeats=2) < 1e14
