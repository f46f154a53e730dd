"""The benchmark: figures by their definition from given moments, prompts of exact length, and the files of the commands."""

import csv
import json

import numpy as np
import paths
import pytest

from runtime import Engine
from runtime.bench import __main__ as bench
from runtime.bench import workload
from runtime.bench.figures import case_figures, perf_info, serving_figures
from runtime.bench.workload import Timeline
from runtime.common.errors import INTERRUPTED, ToolkitError, run_command

GOLDEN = paths.GOLDEN
PICTURES = {"visualglm": "image.png", "llava": "image_a.png"}


def lines():
    return [Timeline(10, 0.5, [1.0, 1.5, 2.5]), Timeline(20, 0.0, [2.0, 2.2, 2.6])]


def test_columns_of_the_guide():
    figures = case_figures(lines())
    assert figures == pytest.approx(
        {
            "ResponseTime(ms)": 2600,
            "FirstTokenTime(ms)": 2000,
            "TimePerTokens(ms)": 300,
            "TokensPerSecond(ms)": 1 / 0.3,
        }
    )
    assert case_figures([Timeline(3, 0, [0.5])])["TimePerTokens(ms)"] is None


def test_serving_figures():
    found = serving_figures(lines())
    assert (
        found["output_throughput"] == pytest.approx(6 / 2.6) and found["total_input_tokens"] == 30
    )
    assert found["mean_ttft_ms"] == 1500 and found["p50_itl_ms"] == pytest.approx(450)
    assert (
        found["mean_tpot_ms"] == pytest.approx((750 + 300) / 2) and found["vision_encode_ms"] == 250
    )


def test_perf_info_has_the_guides_keys_and_units():
    info = perf_info(lines())
    assert info == {
        "latency_num_prompts": "2600.00 ms",
        "latency_per_token": "866.67 ms",
        "request_per_second": "0.769 requests/s",
        "token_per_second": "2.31 tokens/s",
        "prefill_latency_per_token": "1500.00 ms",
        "decode_latency_per_token": "300.00 ms",
        "decode_throughput": "3.33 tokens/s",
    }
    assert perf_info([Timeline(3, 0, [0.5])])["decode_throughput"] is None


@pytest.mark.parametrize(
    "family", ["visualglm", "glm4", "glm4v", "llava", "glm_edge", "glm_edge_v"]
)
def test_prompts_have_the_exact_length_and_differ(family):
    engine = Engine(GOLDEN / family, dtype="float32", vision="torch")
    one, two = workload.text_prompts(engine, 2, 40, np.random.default_rng(0))
    assert len(one.ids) == len(two.ids) == 40 and not np.array_equal(one.ids, two.ids)
    timelines = workload.run(engine, [one, two], 3)
    assert [len(line.tokens) for line in timelines] == [3, 3]
    assert all(line.tokens == sorted(line.tokens) for line in timelines)
    with pytest.raises(ToolkitError, match="--input-len 2 is too short"):
        workload.text_prompts(engine, 1, 2, np.random.default_rng(0))


def test_progress_counts_every_token_of_prompts_and_answers():
    engine = Engine(GOLDEN / "glm4", dtype="float32")
    told = []
    workload.run(
        engine, workload.text_prompts(engine, 2, 20, np.random.default_rng(0)), 3, told.append
    )
    assert sum(told) == 2 * (20 + 3) and len(told) == 6


def run(out, *argv, family="visualglm"):
    return run_command(
        bench.main, ["--model", str(GOLDEN / family), "--vision", "torch", "--out", str(out), *argv]
    )


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file))


def test_grid(tmp_path, capsys):
    assert run(tmp_path, "--batch-size", "1,2", "--input-len", "16,24", "--output-len", "1,4") == 0
    header, *table = rows(tmp_path / "2_batch_performance_visualglm.csv")
    assert ",".join(header) == (
        "Batch,MaxSeqLen,InputSeqLen(Encoding),OutputSeqLen(Decoding),ResponseTime(ms),"
        "FirstTokenTime(ms),TimePerTokens(ms),TokensPerSecond(ms)"
    )
    assert [(r[0], r[2], r[3]) for r in table] == [
        ("2", i, o) for i in ("16", "24") for o in ("1", "4")
    ]
    assert [bool(r[6]) for r in table] == [False, True, False, True]
    stored = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert (
        len(stored["rows"]) == 8
        and stored["peak_host_bytes"] > 1e7
        and (tmp_path / "bench.png").stat().st_size > 1000
    )
    assert "per token" in capsys.readouterr().out
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert (
        "8 of 8 cases." in page
        and "data:image/png;base64,iVBOR" in page
        and page.count("<tr>") == 2 + 2 + 8
    )
    row = stored["rows"][-1]
    assert {
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p50", "p90", "p95", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    } <= set(row)


def test_interrupted_grid_keeps_its_rows(tmp_path, monkeypatch):
    real = workload.run
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # the warm-up and two cases are through
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(workload, "run", interrupted)
    assert run(tmp_path, "--input-len", "16,20,24", "--output-len", "2") == INTERRUPTED
    assert len(rows(tmp_path / "1_batch_performance_visualglm.csv")) == 3
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert len(stored["rows"]) == stored["finished"] == 2 and stored["cases"] == 3
    assert "2 of 3 cases: the run was stopped." in (tmp_path / "bench.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("family", PICTURES)
def test_pictures_are_encoded_for_every_request(family, tmp_path):
    picture = str(GOLDEN / family / PICTURES[family])
    assert (
        run(tmp_path, "--batch-size", "2", "--image", picture, "--output-len", "3", family=family)
        == 0
    )
    [row] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["vision_encode_ms"] > 0 and row["input"] > 20


def test_perf(tmp_path, capsys):
    assert (
        run(
            tmp_path,
            "--perf",
            "--num-prompts",
            "3",
            "--batch-size",
            "2",
            "--input-len",
            "16",
            "--output-len",
            "4",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith('\n***Perf Info***\n{\n    "latency_num_prompts": "')
    [path] = tmp_path.glob("*.csv")
    table = dict(rows(path))
    stored = json.loads(path.with_suffix(".json").read_text())
    assert stored["completed"] == 3 and stored["p99_ttft_ms"] >= stored["median_ttft_ms"] > 0
    assert (
        table["Key"] == "Value"
        and table["num_prompts"] == "3"
        and table["latency_per_token"].endswith(" ms")
    )


def test_demo(tmp_path, capsys):
    assert (
        run(tmp_path, "--demo", "--prompt", "hi", "--output-len", "4", "--model-type", "llava") == 0
    )
    assert "Prompt: " in (out := capsys.readouterr().out) and ", Generated text: " in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--perf",), "--perf measures one case"),
        (("--batch-size", "0"), "--batch-size is '0'"),
        (("--input-len", "a,b"), "give numbers"),
        (("--input-len", "4000"), "no case fits"),
        (("--image", "none.png"), "picture none.png does not exist"),
    ],
)
def test_mistakes(argv, sentence, tmp_path, capsys):
    assert run(tmp_path, *argv) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
