"""`mebm bench` on tiny cases: what is timed, what is computed from it, what it leaves, and Table 6 made of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from analysis.results.load import load, read_bench
from analysis.results.messages import ResultsError
from analysis.tables.paper import build_tables
from analysis.tables.runtime import runtime_table
from study.cli.main import cli
from study.config.errors import RunError, UserError, parse_choices
from study.config.fields import make_trial
from study.estimate import bench as bench_module
from study.estimate.bench import run_bench
from study.estimate.bench_cases import (
    EXECUTIONS,
    LAST,
    SHORT,
    TABLE6,
    BenchOptions,
    Group,
    Variant,
    bench_data,
    cases,
    parse_methods,
    planned_windows,
)
from study.estimate.bench_pace import COMPILE_SECONDS, PLAIN_SECONDS, Deadline, Pace, TimeUp
from study.estimate.bench_rows import BenchFolder, BenchResult
from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.networks.arithmetic import precision_kept, switches
from trainables.results.schema import BENCH_COLUMNS
from trainables.timing.dry_run import iteration_flops
from trainables.timing.timer import Runner, covered, free_memory, kernel_class, peak_flops, quartiles

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
        ("m-ebm", "fp32", "released-loop"),
        ("m-ebm", "fp32", "package"),
        ("jem", "fp32", "package"),
        ("softmax", "fp32", "package"),
        ("m-ebm", "fp32", "released-loop"),
        ("m-ebm", "bf16", "package"),
        ("jem", "bf16", "package"),
        ("softmax", "bf16", "package"),
    ]
    assert [r["row_id"] for r in shown["rows"]] == list(rows["row_id"]) == [f"r00{i}" for i in range(1, 9)]
    assert (rows["seconds_per_iteration"] > 0).all() and (rows["seconds_low"] <= rows["seconds_high"]).all()
    assert set(rows["windows"]) == {3} and set(rows["network"]) == {"conv-4"} and set(rows["threads"]) == {1}
    assert rows["peak_memory_bytes"].isna().all(), "a CPU has no device memory"
    assert shown["failures"] == {} and shown["left_out"] == shown["notes"] == []


def test_every_variant_again_with_other_fields(tmp_path: Path) -> None:
    output = run("--methods", "m-ebm:2", "--precision", "fp32", "--set", "norm=batch", "--json", "--no-baseline",
                 "--also", "merge_bias=true, flipped_backward=true", "--also", "frozen_copies=false",
                 "--out", str(tmp_path))  # fmt: skip
    options = ["", "merge_bias+flipped_backward", "no-frozen_copies"]
    assert [row["options"] or "" for row in json.loads(output.stdout)["rows"]] == options
    rows = read_bench(tmp_path / "bench.parquet")
    assert [json.loads(c)["merge_bias"] for c in rows["config"]] == [False, True, False]
    for wrong, said in (
        ("merge_bais=true", "--also merge_bais: unknown trial field; did you mean merge_bias"),
        ("nonsense", "--also nonsense: must be KEY=VALUE, for example --also fused_norm=true"),
        ("memory_format=upside-down", "memory_format"),
    ):
        with pytest.raises(UserError, match=said):
            run("--methods", "m-ebm:2,jem:20", "--also", wrong, "--out", str(tmp_path))


def test_variants_that_differ_in_any_field_have_rows_of_their_own(tmp_path: Path) -> None:
    run("--methods", "m-ebm:2,vera", "--precision", "fp32", "--no-baseline", "--json", "--out", str(tmp_path),
        "--also", "memory_format=contiguous", "--also", "betas=[0.1, 0.9], class_weight=2.0",
        "--also", "fused_norm=true")  # fmt: skip
    rows = read_bench(tmp_path / "bench.parquet")
    configs = [json.loads(text) for text in rows["config"]]
    assert [c["method"] for c in configs] == ["m-ebm"] * 4 + ["vera"] * 3
    assert list(rows["memory_format"]) == ["channels-last", "contiguous", *["channels-last"] * 3, "contiguous",
                                           "channels-last"]  # fmt: skip
    assert configs[2]["betas"] == [0.1, 0.9] and configs[2]["class_weight"] == 2
    assert configs[3]["fused_norm"] and rows["options"].isna().all(), "what a CPU cannot do is not said to be done"
    notes = json.loads((tmp_path / "bench.json").read_text())["notes"]
    assert len(notes) == 1 and notes[0].startswith("vera not with fused_norm=true: ") and "gradient_penalty" in notes[0]


def test_what_an_earlier_run_left_beside_its_rows_stays(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        run("--methods", "m-ebm:2", "--precision", precision, "--no-baseline", "--profile", "--out", str(tmp_path))
    rows, info = read_bench(tmp_path / "bench.parquet"), json.loads((tmp_path / "bench.json").read_text())
    assert [*(run["bench"] for run in info["earlier"]), info["bench"]] == list(rows["bench"])
    assert list(info["earlier"][0]["peak_flops_per_second"]) == ["fp32"] and "earlier" not in info["earlier"][0]
    profiles = json.loads((tmp_path / "profile.json").read_text())
    assert list(profiles) == ["m-ebm K=2 fp32 eager", "m-ebm K=2 bf16 eager"]


def test_ratios_are_of_the_same_run(timed: Any) -> None:
    shown, rows, _ = timed
    over = rows["speedup_over_baseline"]
    assert list(over.notna()) == [False, True, False, False, False, True, False, False]
    assert shown["speedup_over_baseline"] == pytest.approx((over[1] * over[5]) ** 0.5)
    # Table 6's definition, at the row's own precision; the released loop has no JEM.
    for first, jem in ((1, 2), (5, 6), (7, 6)):
        wanted = rows["seconds_per_iteration"][jem] / rows["seconds_per_iteration"][first]
        assert rows["speedup_over_jem"][first] == pytest.approx(wanted)
    assert rows["speedup_over_jem"][2] == 1 and pd.isna(rows["speedup_over_jem"][0])


def test_rates_follow_from_times_and_counts(timed: Any) -> None:
    shown, rows, _ = timed
    config = build_trial(json.loads(rows["config"][0]))
    assert rows["flops_per_iteration"][0] == iteration_flops(config, (1, 8, 8), 10)
    rate = rows["flops_per_iteration"] / rows["seconds_per_iteration"]
    pd.testing.assert_series_equal(rows["flops_per_second"], rate, check_names=False)
    assert rows["mfu"][5] == pytest.approx(rate[5] / shown["peak_flops_per_second"]["bf16"])
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
    assert info["finished"] and info["bench"] == list(after["bench"])[-1]
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


def test_table_6_keeps_apart_what_was_timed_differently() -> None:
    """Two runs, whose row ids both begin at r001, with and without an option that halves the time."""
    rows = []
    for number, (options, seconds) in enumerate(((None, 1.0), ("fused_norm", 0.5))):
        for at, (method, steps, factor) in enumerate((("jem", 20, 3.0), ("m-ebm", 5, 1.0), ("m-ebm", 5, 1.0))):
            config = build_trial({"method": method, "dataset": "cifar10", "fused_norm": options is not None})
            rows.append(
                {"implementation": "package", "bench": f"bench-{number}", "row_id": f"r{at + 1:03d}", "method": method,
                 "sampling_steps": steps, "dataset": "cifar10", "network": "wrn-28-10", "precision": "fp32",
                 "seconds_per_iteration": factor * seconds, "hardware": "GPU", "device": "cuda", "execution": "graphed",
                 "options": options, "config": config.to_json()}
            )  # fmt: skip
    table = runtime_table([], rows).set_index("model")
    assert table.loc["JEM(K=20)"]["speedup_mean"] == 1 and table.loc["JEM(K=20)"]["trials"] == 1
    row = table.loc["M-EBM(K=5)"]
    assert row["speedup_mean"] == 3 and row["speedup_sd"] == 0 and row["trials"] == 2, "timed twice in one way"
    assert row["minutes_per_epoch_mean"] in (6.5, 3.25) and row["minutes_per_epoch_sd"] == 0


def test_methods_are_parsed() -> None:
    assert parse_methods(None, CPU) == SHORT
    assert parse_methods(None, torch.device("cuda")) == TABLE6 == parse_methods("table6", CPU)
    assert parse_methods("m-ebm", CPU) == (("m-ebm", 5), ("m-ebm", 1), ("m-ebm", 2), ("m-ebm", 10))
    assert parse_methods("jem:7, vera,jem:7", CPU) == (("jem", 7), ("vera", None))
    assert parse_methods("all", CPU) == tuple((name, None) for name in METHODS)
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
    groups = {g.title: [v.config for v in g.variants if not v.released] for g in cases(options)}
    found = {title: [c.execution for c in configs] for title, configs in groups.items()}
    assert found == {"m-ebm K=1": ["eager", "compiled"], "igebm K=2": ["eager"], "vera": ["eager"]}
    networks = {title: configs[0].network for title, configs in groups.items()}
    assert networks == {"m-ebm K=1": "wrn-10-1", "igebm K=2": "igebm-128", "vera": "wrn-10-1"}
    assert planned_windows(options) == 2 * (2 + 1 + 1 + 1)  # with the released loop beside M-EBM


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
    assert quartiles((3.0, 1.0, 2.0)) == [1.5, 2.0, 2.5]
    assert quartiles((3.0,)) == [3.0, 3.0, 3.0]
    result = BenchResult()
    assert result.over_baseline is None
    for number, ratio in enumerate((1.0, 4.0, None)):
        result.put(str(number), dict.fromkeys(c.name for c in BENCH_COLUMNS) | {"speedup_over_baseline": ratio})
    assert result.over_baseline == pytest.approx(2.0)


def test_kernels_have_classes() -> None:
    product, norm, copy = "convolution and matrix product", "norm", "copy and index"
    names = {
        "aten::mkldnn_convolution": product,
        "sm90_xmma_fprop_implicit_gemm_bf16": product,
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": product,
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_64x64_32x6_nhwc>": product,
        "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true>": product,
        "implicit_convolve_sgemm": product,
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>": product,
        "triton_tem_fused_convolution_3": product,
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW": norm,
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16>": norm,
        "void at::native::batch_norm_collect_statistics_channels_last_kernel": norm,
        "aten::native_batch_norm_backward": norm,
        "_bn_statistics": norm,
        "_bn_apply": norm,
        "_bn_backward": norm,
        **dict.fromkeys(("_sums", "_apply", "_backward_sums", "_backward"), norm),
        "triton_red_fused__native_batch_norm_legit_functional_2": norm,
        "aten::_fused_sgd_": "optimiser",
        "void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor<float>>": "optimiser",
        "aten::normal_": "random numbers",
        "void at::native::distribution_elementwise_grid_stride_kernel<float, 4>": "random numbers",
        "aten::copy_": copy,
        "Memcpy HtoD (Pageable -> Device)": copy,
        "Memset (Device)": copy,
        "void cudnn::engines_precompiled::nchwToNhwcKernel<float>": copy,
        "aten::sum": "reduction",
        "triton_red_fused_mean_sum_4": "reduction",
        "triton_per_fused_convolution_backward_sum_7": "reduction",
        "triton_poi_fused_leaky_relu_0": "elementwise",
        "triton_poi_fused_convolution_leaky_relu_1": "elementwise",
        "cpp_fused_convolution_leaky_relu_0": "elementwise",
        "void at::native::vectorized_elementwise_kernel<4, at::native::leaky_relu_kernel>": "elementwise",
        "something": "other",
    }
    assert {name: kernel_class(name) for name in names} == names


def test_kernels_at_once_are_busy_once() -> None:
    assert covered([(4, 6), (0, 2), (1, 3), (1, 2)]) == 5 and covered([]) == 0


def test_a_matrix_peak_is_a_rate() -> None:
    assert 1e8 < peak_flops(CPU, "fp32", size=128, repeats=2) < 1e14


# ------------------------------------------------------------------------------------------- arithmetic, one by one


def options_of(methods: str, **more: Any) -> BenchOptions:
    fields: dict[str, Any] = {"precisions": ("fp32",), "executions": ("eager",), "rounds": 2, "seconds": 0.001}
    return BenchOptions(parse_methods(methods, CPU), "conv-4", device=CPU, dataset="digits", **(fields | more))


Wrapper = Callable[[Any, str, Callable[[], None]], Callable[[], None]]


def wrap_loops(monkeypatch: pytest.MonkeyPatch, wrapper: Wrapper) -> None:
    """Puts `wrapper(learner or loop, name, advance)` in the place of every advance; all else stays real."""

    def wrapped(context: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        @contextmanager
        def loop(*arguments: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
            with context(*arguments) as (what, advance):
                yield what, wrapper(what, name(*arguments), advance)

        return loop

    package = wrapped(bench_module.package_loop, lambda c, *_: f"{c.method} {c.precision}")
    monkeypatch.setattr(bench_module, "package_loop", package)
    monkeypatch.setattr(bench_module, "released_loop", wrapped(bench_module.released_loop, lambda *_: "released"))


def test_every_window_and_profile_has_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[tuple[str, str, bool]]] = {}
    calls: dict[str, int] = {}

    def probe(_what: Any, name: str, advance: Callable[[], None]) -> Callable[[], None]:
        def probed() -> None:
            seen.setdefault(name, set()).add(switches())
            calls[name] = calls.get(name, 0) + 1
            advance()

        return probed

    wrap_loops(monkeypatch, probe)
    before = switches()
    options = options_of("m-ebm:1,softmax", precisions=("fp32", "tf32", "bf16"), profiled=True)
    result = run_bench(replace(options, assignments=("cudnn_benchmark=true",)))
    assert len(result.rows) == 9 and len(result.profiles) == 6 and not result.failures
    ours = {"fp32": ("ieee", "ieee", True), "tf32": ("tf32", "tf32", True), "bf16": ("ieee", "ieee", True)}
    wanted = {f"{m} {p}": {switch} for m in ("m-ebm", "softmax") for p, switch in ours.items()}
    assert seen == wanted | {"released": {("ieee", "tf32", False)}}
    assert min(calls.values()) >= 1 + 2 + 3, "warm-up, rounds and profile were all seen"
    assert switches() == before


def test_images_have_the_size_that_is_asked_for() -> None:
    options = replace(options_of("softmax"), dataset="cifar10", rounds=1, assignments=("image_size=8",))
    (row,) = run_bench(options).rows
    config = TrialConfig.model_validate_json(row["config"])
    assert config.image_size == 8 and row["flops_per_iteration"] == iteration_flops(config, (3, 8, 8), 10)


def test_runners_of_unlike_precision_take_turns() -> None:
    seen: list[tuple[str, str, bool]] = []

    def build() -> Callable[[], None]:
        return lambda: seen.append(switches())

    with precision_kept():
        one, other = Runner(build, CPU, precision="tf32"), Runner(build, CPU, precision="pytorch")
        seen.clear()
        for runner in (one, other, one):
            runner.window(1)
    assert seen == [("tf32", "tf32", False), ("ieee", "tf32", False), ("tf32", "tf32", False)]


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_variant_that_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package_ran: list[str] = []

    def broken(_what: Any, name: str, advance: Callable[[], None]) -> Callable[[], None]:
        if name == "released":
            package_ran.clear()

        def advance_or_fail() -> None:
            if name == "jem bf16" or (name == "released" and package_ran):  # that is, in the first round
                raise ValueError("it is\nbroken " + 500 * "x")
            if name != "released":
                package_ran.append(name)
            advance()

        return advance_or_fail

    wrap_loops(monkeypatch, broken)
    arguments = ["--methods", "m-ebm:1,jem:2", "--precision", "bf16,fp32", "--rounds", "3"]
    output = run(*arguments, "--json", "--out", str(tmp_path / "b"))
    shown = json.loads(output.stdout)
    rows = [(r["method"], r["precision"], r["implementation"], r["windows"]) for r in shown["rows"]]
    assert output.exit_code == 0
    assert [r[:3] for r in rows] == [
        ("m-ebm", "fp32", "released-loop"),
        ("m-ebm", "bf16", "package"),
        ("m-ebm", "fp32", "released-loop"),
        ("m-ebm", "fp32", "package"),
        ("jem", "fp32", "package"),
    ]
    assert {windows for _, _, what, windows in rows if what == "package"} == {3}
    assert set(shown["failures"]) == {
        "jem K=2 bf16 eager", "m-ebm K=1 released-loop beside bf16", "m-ebm K=1 released-loop beside fp32",
    }  # fmt: skip
    error = shown["failures"]["jem K=2 bf16 eager"]
    assert error.startswith("ValueError: it is broken xxx") and len(error) < 310
    assert json.loads((tmp_path / "b" / "bench.json").read_text())["failures"] == shown["failures"]
    assert len(read_bench(tmp_path / "b" / "bench.parquet")) == 5
    output = run("--methods", "m-ebm:1,jem:2", "--precision", "bf16", "--out", str(tmp_path / "b"))
    assert "failed: jem K=2 bf16 eager: ValueError: it is broken" in output.stdout
    assert len(read_bench(tmp_path / "b" / "bench.parquet")) == 7


def test_where_nothing_can_be_measured_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--methods", "m-ebm:1", "--json", "--out", str(tmp_path / "b")]
    none = CliRunner().invoke(cli, ["bench", *TINY, *arguments, "--execution", "graphed"])
    assert isinstance(none.exception, RunError)
    assert json.loads(none.stdout)["notes"] == ["m-ebm K=1 can do none of graphed"]

    def broken(*_: Any) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    wrap_loops(monkeypatch, broken)
    result = CliRunner().invoke(cli, ["bench", *TINY, *arguments, "--precision", "fp32"])
    assert isinstance(result.exception, RunError) and json.loads(result.stdout)["rows"] == []
    assert len(json.loads(result.stdout)["failures"]) == 2 and not (tmp_path / "b" / "bench.parquet").exists()


def test_what_does_not_fit_beside_others_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the released loop and one more: of three variants two are timed later, with the loop beside them."""
    alive: set[str] = set()
    built: list[tuple[str, int]] = []
    plain = bench_module.package_loop

    @contextmanager
    def small(config: Any, data: Any) -> Iterator[Any]:
        name = config.memory_format + str(config.signal_every)
        if alive:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with plain(config, data) as loop:
            alive.add(name)
            built.append((name, len(alive)))
            yield loop
        alive.remove(name)

    monkeypatch.setattr(bench_module, "package_loop", small)
    options = options_of("m-ebm:1")
    (group,) = cases(options)
    released, first = group.variants
    more = [
        replace(first, title=f"m-ebm {i}", config=first.config.model_copy(update={"signal_every": i})) for i in (2, 3)
    ]
    bench = bench_module._Bench(options, [], bench_data(options), None, Deadline(), print, print)
    bench._time(replace(group, variants=(released, first, *more)), 2)
    rows = bench.result.rows
    assert [(r["implementation"], json.loads(r["config"])["signal_every"], r["windows"]) for r in rows] == [
        ("released-loop", 1, 2), ("package", 1, 2), ("package", 2, 2), ("package", 3, 2),
    ]  # fmt: skip
    assert all(row["speedup_over_baseline"] for row in rows[1:]) and not bench.result.failures
    assert len(built) == 3 and not alive


def test_a_row_says_what_was_really_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_back(learner: Any, name: str, advance: Callable[[], None]) -> Callable[[], None]:
        def first() -> None:
            if name != "released" and not learner.execution.compiled:
                learner.context.execution = replace(learner.execution, compiled=True)
                learner.remarks.append("it was done otherwise")
            advance()

        return first

    wrap_loops(monkeypatch, falls_back)
    result = run_bench(options_of("m-ebm:1"))
    assert [r["execution"] for r in result.rows] == ["eager", "compiled"]
    assert result.notes == ["m-ebm K=1 fp32 eager ran compiled: it was done otherwise"]


# ------------------------------------------------------------------------------------------------------- interrupted


def test_what_was_measured_before_an_interruption_stays(tmp_path: Path) -> None:
    folder, windows = BenchFolder(tmp_path / "b"), itertools.count(1)

    def third(_name: str) -> None:
        if next(windows) == 5:
            raise KeyboardInterrupt

    result = run_bench(options_of("m-ebm:1,softmax", rounds=9), folder, on_window=third)
    assert result.interrupted and result.notes == ["interrupted during round 3 of m-ebm K=1 released-loop beside fp32"]
    assert result.left_out == ["softmax fp32"]
    rows = read_bench(tmp_path / "b" / "bench.parquet")
    assert list(rows["windows"]) == [2, 2] and rows["speedup_over_baseline"].notna().tolist() == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_its_rows(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["--methods", "m-ebm:1", "--precision", "fp32", "--rounds", "1000", "--seconds", "0.5", "--json"]
    command = [sys.executable, "-m", "study.cli", "bench", *TINY, *arguments, "--out", str(tmp_path / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 300
        while not (rows := rows_of(tmp_path / "b")) or rows[0] < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        os.kill(process.pid, number)
        out, error = process.communicate(timeout=120)
    assert len(rows_of(tmp_path / "b")) == 2
    info = json.loads((tmp_path / "b" / "bench.json").read_text())
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and not info["finished"]
        return
    assert process.returncode == 130
    assert f"mebm: interrupted; 2 row(s) so far are in {tmp_path}" in error
    assert json.loads(out)["interrupted"] and info["interrupted"] and info["finished"]


def rows_of(folder: Path) -> list[int]:
    """Windows of each row there is by now."""
    path = folder / "bench.parquet"
    return read_bench(path)["windows"].tolist() if path.is_file() else []


def test_runs_in_one_folder_keep_each_others_rows(tmp_path: Path) -> None:
    one, other = BenchFolder(tmp_path), BenchFolder(tmp_path)
    result = run_bench(options_of("softmax"), one)
    third = BenchFolder(tmp_path)
    assert third.bench != one.bench
    run_bench(options_of("softmax"), third)
    one.write(result)
    assert sorted(read_bench(tmp_path / "bench.parquet")["bench"]) == sorted([one.bench, third.bench])
    other.write(BenchResult())
    assert len(read_bench(tmp_path / "bench.parquet")) == 2
    (tmp_path / "bench.parquet").write_bytes(b"damaged")
    with pytest.raises(ResultsError, match=r"bench\.parquet"):
        BenchFolder(tmp_path)


# ------------------------------------------------------------------------------------------------- limits and worth


def test_a_gpu_times_the_most_wanted_first() -> None:
    options = BenchOptions(
        methods=TABLE6,
        network="wrn-28-10",
        precisions=("bf16", "tf32", "fp32"),
        executions=EXECUTIONS,
        device=torch.device("cuda"),
        limited=True,
    )
    groups = cases(options)
    assert groups[0].label == "m-ebm K=5 bf16" and groups[0].variants[0].released
    assert [v.config.execution for v in groups[0].variants[1:]] == list(EXECUTIONS)
    labels = [g.label for g in groups]
    assert labels[:3] == ["m-ebm K=5 bf16", "m-jem K=5 bf16", "jem K=20 bf16"]
    assert labels.index("vera bf16") < labels.index("m-ebm K=5 tf32") < labels.index("m-ebm K=5 fp32")
    assert [g.title.split()[0] in LAST for g in groups] == [False] * (len(groups) - 9) + [True] * 9
    jem = [[v.config.execution for v in g.variants] for g in groups if g.label == "jem K=20 bf16"]
    assert jem == [["eager", "graphed"], ["compiled", "compiled-graphed"]], "compiling it waits"
    assert not any(v.released for g in groups if g.title.split()[0] not in ("m-ebm", "m-jem") for v in g.variants)
    every = [v.label for g in groups for v in g.variants]
    assert len(every) == len(set(every))
    together = cases(replace(options, limited=False))
    assert [len(g.variants) for g in together if g.label == "jem K=20 bf16"] == [4]
    assert sorted(v.label for g in together for v in g.variants) == sorted(every)


def variant(method: str, steps: int, execution: str = "eager", *, released: bool = False) -> Variant:
    values = {"method": method, "network": "conv-4", "sampling_steps": steps, "execution": execution}
    return Variant(f"{method} K={steps}", make_trial(values, "test"), released)


def test_what_is_expected_follows_from_what_was_seen() -> None:
    pace = Pace(lambda c: 1e9 * c.sampling_steps, {"fp32": 1e10}, seconds=1.0, gpu=True)
    two, four, loop = variant("m-ebm", 2), variant("m-ebm", 4), variant("m-ebm", 4, released=True)
    assert pace.iteration(four) == 2 * pace.iteration(two) < pace.iteration(loop)
    pace.learn_start(two, seconds=10.0, iteration=0.4)
    assert pace.iteration(four) == pytest.approx(0.8) and pace.window(four) == pytest.approx(1.6)
    assert pace.start(four) == pytest.approx(10.0 - 6 * 0.4 + 6 * 0.8)
    assert pace.iteration(variant("m-jem", 4)) == pytest.approx(0.8), (
        "of another method as well, as long as it is unseen"
    )
    pace.learn_start(loop, seconds=20.0, iteration=3.0)
    assert pace.iteration(loop) == pytest.approx(3.0) and pace.iteration(four) == pytest.approx(0.8)
    compiled = variant("m-ebm", 4, "compiled")
    assert pace.start(compiled) == pytest.approx(COMPILE_SECONDS + pace.start(four))
    pace.learn_start(compiled, seconds=60.0, iteration=0.5)
    assert pace.start(variant("m-ebm", 1, "compiled")) < 10, "another K takes the same graphs"
    assert pace.start(variant("m-jem", 1, "compiled")) > 40, "another method compiles as long as the first"


def test_rounds_are_cut_so_that_more_is_measured() -> None:
    pace = Pace(lambda c: 3e9, {"fp32": 1e10}, seconds=1.0, gpu=True)
    group = Group("m-ebm K=2", "fp32", (variant("m-ebm", 2),))
    one = PLAIN_SECONDS + 6  # an iteration a second
    assert pace.least(group) == pytest.approx(one + 1)
    assert pace.rounds(group, [], 9, float("inf")) == 9
    assert pace.rounds(group, [], 9, 1000) == 9 and pace.rounds(group, [], 9, 12) == 0
    assert pace.rounds(group, [], 9, 1.15 * (one + 7.5)) == 7
    assert pace.rounds(group, [group], 9, 1.15 * 2 * (one + 4.5)) == 4, "half of the time is the other's"
    assert pace.rounds(group, 20 * [group], 9, 60) == 3, "fewer than three say little"


@pytest.mark.slow
def test_a_limit_is_obeyed(tmp_path: Path) -> None:
    begun = time.monotonic()
    arguments = ["--methods", "m-ebm:1,jem:20,softmax", "--rounds", "1000", "--seconds", "0.2", "--minutes", "0.35"]
    output = run(*arguments, "--json", "--out", str(tmp_path / "b"))
    assert time.monotonic() - begun < 21 + 20
    shown = json.loads(output.stdout)
    assert shown["rows"] and max(r["windows"] for r in shown["rows"]) < 1000
    assert any("for want of time" in note for note in shown["notes"]) or shown["left_out"]
    first = shown["rows"][0]
    assert (first["implementation"], first["method"]) == ("released-loop", "m-ebm")
    with pytest.raises(UserError, match=r"--suite packing: now is python -m benchmarks\.overhead --suite packing"):
        run("--suite", "packing", "--minutes", "1")


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """By a clock that stands still but for what the warm-up of a variant is said to take."""
    now = [0.0]
    folder, deadline = BenchFolder(tmp_path), Deadline(30.0, clock=lambda: now[0])

    def say(text: str) -> None:
        now[0] += 29.0 if text.startswith("m-ebm") else 0.0

    result = run_bench(options_of("m-ebm:1,softmax", limited=True), folder, deadline=deadline, say=say)
    assert [r["method"] for r in result.rows] == ["m-ebm", "m-ebm"] and result.left_out == ["softmax fp32"]
    assert json.loads((tmp_path / "bench.json").read_text())["left_out"] == ["softmax fp32"]


def test_what_hangs_past_the_limit_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.estimate.bench_pace.GRACE", 0.0)

    def hangs(_what: Any, name: str, advance: Callable[[], None]) -> Callable[[], None]:
        def wait() -> None:
            if name == "softmax fp32":
                time.sleep(60)
            advance()

        return wait

    wrap_loops(monkeypatch, hangs)
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    begun = time.monotonic()
    result = run_bench(options_of("m-ebm:1,softmax,vera"), deadline=Deadline(20.0))
    assert time.monotonic() - begun < 20 + 20
    assert "broken off during the warm-up of softmax fp32 eager" in result.notes[0]
    assert len(result.rows) == 2 and result.left_out == ["vera fp32"] and not result.interrupted
    assert signal.getsignal(signal.SIGALRM) == before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer > 0), "the test's own alarm goes on"
    with pytest.raises(TimeUp), Deadline(0.01).enforced():
        time.sleep(60)


# --------------------------------------------------------------------------------------------------- compiled, on CUDA


@pytest.mark.slow
def test_a_second_learner_of_the_same_shapes_compiles_nothing() -> None:
    from torch._dynamo.utils import counters

    def graphs(methods: str) -> int:
        before = counters["stats"]["unique_graphs"]
        result = run_bench(options_of(methods, executions=("compiled",), baseline=False, rounds=1))
        assert [r["execution"] for r in result.rows] == ["compiled"] and not result.failures
        return int(counters["stats"]["unique_graphs"] - before)

    assert graphs("m-ebm:1") > 0
    assert graphs("m-ebm:2") == graphs("m-ebm:1") == 0


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_is_timed_without(tmp_path: Path) -> None:
    """The compiler that Inductor calls is broken: a failure from deep inside of PyTorch."""
    arguments = ["--methods", "m-ebm:1", "--precision", "fp32", "--execution", "eager,compiled", "--no-baseline"]
    command = [
        sys.executable,
        "-m",
        "study.cli",
        "bench",
        *TINY,
        *arguments,
        "--json",
        "--out",
        str(tmp_path / "b"),
    ]
    caches = {"MEBM_CACHE": str(tmp_path / "c"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    environment = os.environ | caches | {"CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    shown = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [r["execution"] for r in shown["rows"]] == ["eager"] and list(shown["failures"]) == [
        "m-ebm K=1 fp32 compiled"
    ]
    assert "failed: m-ebm K=1 fp32 compiled" in done.stderr


@pytest.mark.gpu
@needs_gpu
def test_memory_is_a_variants_own() -> None:
    cuda = torch.device("cuda")
    options = replace(options_of("m-ebm:1"), device=cuda, network="conv-64", executions=("eager", "graphed"))
    run_bench(options)  # libraries keep a workspace for good
    before = torch.cuda.memory_allocated()
    result = run_bench(options)
    together = {r["execution"]: r for r in result.rows if r["implementation"] == "package"}
    alone = run_bench(replace(options, executions=("graphed",), baseline=False)).rows[0]
    assert together["graphed"]["peak_memory_bytes"] == pytest.approx(alone["peak_memory_bytes"], rel=0.2)
    assert together["eager"]["peak_memory_bytes"] > 0 and alone["mfu"] > 0
    assert result.memory["m-ebm K=1 fp32 graphed"] >= together["graphed"]["peak_memory_bytes"]
    free_memory(cuda)
    assert torch.cuda.memory_allocated() <= before + 2**20, "all of it is given back"


@pytest.mark.gpu
@needs_gpu
def test_a_profile_tells_kernels_from_idle_time() -> None:
    options = replace(options_of("m-ebm:1"), device=torch.device("cuda"), profiled=True, baseline=False)
    result = run_bench(options)
    (shares,) = result.profiles.values()
    assert shares["convolution and matrix product"] > 0
    assert 0 <= shares["idle"] <= result.rows[0]["seconds_per_iteration"]


@pytest.mark.gpu
@needs_gpu
def test_what_does_not_fit_on_the_device_is_said() -> None:
    options = replace(options_of("m-ebm:1"), device=torch.device("cuda"), assignments=("buffer_size=10000000",))
    held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.9), dtype=torch.uint8, device="cuda")
    result = run_bench(replace(options, baseline=False, dataset="cifar10"))
    del held
    assert not result.rows and "memory" in next(iter(result.failures.values())).lower()
