"""The benchmark: figures by their definition from given moments, prompts of exact length, and the files of the commands."""

import csv
import json

import numpy as np
import paths
import pytest

from runtime import Engine
from runtime.__main__ import main as guide_main
from runtime.bench import __main__ as bench
from runtime.bench import record, workload
from runtime.bench.figures import case_figures, perf_info, serving_figures
from runtime.bench.options import BenchOptions
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
            "PictureProcessTime(ms)": 250,
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
        "picture_process_time": "250.00 ms",
    }
    assert perf_info([Timeline(3, 0, [0.5])])["decode_throughput"] is None


@pytest.mark.parametrize(
    "family",
    ["visualglm", "glm4", "glm4_0414", "glm4v", "llava", "glm_edge", "glm_edge_v"],
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
        "FirstTokenTime(ms),TimePerTokens(ms),TokensPerSecond(ms),PictureProcessTime(ms)"
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


def test_cases_that_do_not_fit_are_named(tmp_path, capsys):
    assert (
        run(tmp_path, "--batch-size", "1,2", "--input-len", "2,32,9000", "--output-len", "4") == 0
    )
    told = "left out: 9000 in, 4 out (9004 tokens, the limit is "
    captured = capsys.readouterr()
    assert told in captured.err and told in " ".join(captured.out.split())
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["cases"] == 6 and stored["finished"] == 2
    left_out = [(case["batch"], case["input"]) for case in stored["left_out"]]
    assert left_out == [(1, 2), (1, 9000), (2, 2), (2, 9000)]
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "2 of 6 cases, 4 left out." in page and "batch 2, 9000 in, 4 out: 9004 tokens" in page


def test_performance_mode_measures_the_guides_batches(tmp_path):
    argv = ["--mode", "performance", "--model_path", str(GOLDEN / "glm4"), "--input-len", "16"]
    assert guide_main([*argv, "--output-len", "2", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in stored["rows"]] == [1, 2, 4, 8]
    assert len(list(tmp_path.glob("*_batch_performance_glm-4.csv"))) == 4
    assert guide_main([*argv, "--output-len", "2", "--batch", "2", "--out", str(tmp_path)]) == 0
    [row] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["batch"] == 2


@pytest.mark.parametrize("family", PICTURES)
def test_pictures_are_encoded_for_every_request(family, tmp_path):
    picture = str(GOLDEN / family / PICTURES[family])
    assert (
        run(tmp_path, "--batch-size", "2", "--image", picture, "--output-len", "3", family=family)
        == 0
    )
    [row] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["vision_encode_ms"] > 0 and row["input"] > 20
    [table] = tmp_path.glob("2_batch_*.csv")
    assert float(rows(table)[1][8]) == pytest.approx(row["PictureProcessTime(ms)"], abs=0.01)


def only_csv(folder):
    """(Key -> Value of the csv, the json beside it)"""
    [path] = folder.glob("*.csv")
    return dict(rows(path)), json.loads(path.with_suffix(".json").read_text())


def test_perf_with_a_picture_writes_the_length_that_was_used(tmp_path):
    picture = str(GOLDEN / "llava" / "image_a.png")
    argv = ["--perf", "--image", picture, "--input-len", "2048", "--output-len", "2"]
    assert run(tmp_path, *argv, family="llava") == 0
    table, stored = only_csv(tmp_path)
    assert int(table["input_len"]) == stored["total_input_tokens"] != 2048
    assert table["picture_process_time"].endswith(" ms") and stored["vision_encode_ms"] > 0


LLAVA_PERF = (
    "--perf --model-type=llava --tensor-parallel-size=1 --device cpu --max-model-len=200 "
    "--input-len=64 --output-len=3 --num-prompts 1 --batch-size=1 --block-size=64 --dtype=float32 "
    "--enforce-eager"
)


def test_every_argument_is_written(tmp_path, capsys):
    assert run(tmp_path, *LLAVA_PERF.split(), family="llava") == 0
    expected = {
        "model": str(GOLDEN / "llava"),
        "model_type": "llava",
        "device": "cpu",
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "max_model_len": 200,
        "block_size": 64,
        "input_len": 64,
        "output_len": "3",
        "num_prompts": 1,
        "batch_size": "1",
        "enforce_eager": True,
        "memory_utilization": 0.9,
        "cpu_weights": "float",
    }
    table, stored = only_csv(tmp_path)
    assert {name: stored[name] for name in expected} == expected
    assert {name: table[name] for name in expected} == {n: str(v) for n, v in expected.items()}
    assert stored["peak_host_bytes"] > 1e7 and stored["peak_device_bytes"] is None
    assert "--enforce-eager has no effect on cpu" in capsys.readouterr().err


NPU_SMI = "| 0 910B4 | OK | 88.2 30 0 / 0 |\n| 0 | 0000:C1:00.0 | 0 0 / 0 2048/ 32768 |"


def test_memory_of_the_device(monkeypatch):
    engine = Engine(GOLDEN / "glm4", dtype="float32")
    assert record.peak_memory(engine)["npu_smi_used_bytes"] is None  # there is no npu-smi
    monkeypatch.setattr(record.Host, "run", lambda self, *command, timeout: (0, NPU_SMI))
    monkeypatch.setattr(engine, "peak_device_bytes", lambda: 3 << 29)
    found = record.peak_memory(engine)
    assert found["npu_smi_used_bytes"] == 2 << 30
    told = record.describe_peaks(found)
    assert ", 1.50 GiB on the device (npu-smi shows 2.00 GiB in use)" in told


def test_the_grid_writes_what_was_chosen_for_us(tmp_path):
    assert run(tmp_path, "--input-len", "16", "--output-len", "2") == 0
    arguments = json.loads((tmp_path / "bench.json").read_text())["arguments"]
    assert arguments["dtype"] == "float32" and arguments["block_size"] == 16
    assert arguments["max_model_len"] > 16 and arguments["batch_size"] == "1"


def test_prompts_run_together_unless_a_batch_size_says_otherwise(tmp_path, monkeypatch):
    together = []
    real = bench.open_engine
    monkeypatch.setattr(
        bench, "open_engine", lambda *given: together.append(given[1].max_num_seqs) or real(*given)
    )
    perf = ["--perf", "--num-prompts", "8", "--input-len", "16", "--output-len", "2"]
    assert run(tmp_path, *perf, family="glm4") == 0
    assert run(tmp_path, *perf, "--batch-size", "2", family="glm4") == 0
    assert together == [8, 2]


def test_demo_and_perf_together(tmp_path, capsys):
    argv = ["--demo", "--perf", "--prompt", "hi", "--input-len", "16", "--output-len", "2"]
    assert run(tmp_path, *argv, family="glm4") == 0
    printed = capsys.readouterr().out
    assert "Generated text: " in printed and "***Perf Info***" in printed


def test_perf_with_a_black_picture(tmp_path):
    """As later vllm_utils guides ask for it; the length is the question's own."""
    argv = ["--perf", "--input-vision-shape=56,60", "--input-len", "9", "--max-output-len", "2"]
    assert run(tmp_path, *argv, family="glm4v") == 0
    [file] = tmp_path.glob("*.json")
    written = json.loads(file.read_text())
    assert written["input_vision_shape"] == "56,60" and written["image"] == []
    assert written["input_len"] > 9 and written["output_len"] == "2"


@pytest.mark.parametrize(
    "template",
    [
        "Answer in one word: {} Be brief.",
        "[gMASK]<sop><|user|>\nAnswer in one word: {} Be brief.<|assistant|>",
        "USER: <image>\nAnswer in one word: {} Be brief. ASSISTANT:",
        r"[gMASK] <sop> <|user|> \n Answer in one word: {} Be brief. <|assistant|>",
    ],
)
def test_prompt_template(template, tmp_path, capsys):
    argv = ["--demo", "--prompt", "{why}", "--prompt-template", template, "--output-len", "2"]
    assert run(tmp_path, *argv, "--tokenizer", str(GOLDEN / "glm4"), family="glm4") == 0
    shown = capsys.readouterr().out
    assert "Answer in one word: {why} Be brief." in shown and shown.count("<|user|>") <= 1
    assert "\\n" not in shown


def test_a_prompt_with_the_guides_frame(tmp_path, capsys):
    """As the newer vllm_utils guide types it: the picture has one place, and no \\n is shown."""
    picture = str(GOLDEN / "llava" / "image_a.png")
    prompt = r"\nUSER: <image>Describe the picture.\nASSISTANT:"
    argv = ["--demo", "--image", picture, "--prompt", prompt, "--output-len", "2", "--vision"]
    assert run(tmp_path, *argv, "torch", family="llava") == 0
    shown = capsys.readouterr().out
    assert "\nDescribe the picture. ASSISTANT:" in shown and shown.count("USER:") == 1


@pytest.mark.parametrize(
    "family, name",
    [
        ("glm4v", "glm-4v"),
        ("glm4", "chatglm"),
        ("llava", "LLaVA-1.5"),
        ("glm_edge_v", "glm-edge-v"),
    ],
)
def test_model_types_that_fit(family, name):
    BenchOptions(model=str(GOLDEN / family), model_type=name)


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
        run(tmp_path, "--demo", "--prompt", "hi", "--output-len", "4", "--model-type", "visualglm")
        == 0
    )
    assert "Prompt: " in (out := capsys.readouterr().out) and ", Generated text: " in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--perf",), "--perf measures one case"),
        (("--batch-size", "0"), "--batch-size is '0'"),
        (("--input-len", "a,b"), "give numbers"),
        (("--input-len", "4000"), "no case fits"),
        (("--model-type", "llava"), "--model-type is 'llava'"),
        (("--model-type", "-"), "--model-type is '-'"),
        (("--tokenizer", "THUDM/glm-4-9b-chat"), "the tokenizer beside the weights is used"),
        (("--prompt-template", "no place"), "it needs exactly one {}"),
        (("--prompt-template", "{} {name}"), "it needs exactly one {}"),
        (("--device", "gcu"), "a card of another vendor"),
        (("--device", "npu:x"), "--device is 'npu:x'"),
        (("--image", "none.png"), "picture none.png does not exist"),
        (("--input-vision-shape", "1120"), "give height and width, each at most 8192"),
        (("--input-vision-shape", "99999,1"), "give height and width, each at most 8192"),
        (("--backend", "vllm"), "one engine runs the model here; leave it out"),
    ],
)
def test_mistakes(argv, sentence, tmp_path, capsys):
    assert run(tmp_path, *argv) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
