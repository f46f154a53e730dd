"""Precision report: measures against their definitions, the verdict, files, and the command on a tiny checkpoint."""

import errno
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import paths
import pytest
from PIL import Image

from runtime.common import files, metrics
from runtime.common import sample_questions as questions
from runtime.common.errors import ToolkitError, run_command
from runtime.compare import __main__ as compare
from runtime.compare import cases, components, outcomes, runs, verdict
from runtime.compare.dataset import read as read_dataset
from runtime.compare.layers import layerwise
from runtime.compare.options import CompareOptions
from runtime.compare.report import formats
from runtime.compare.report import page as report

GOLDEN = paths.GOLDEN / "visualglm"
RNG = np.random.default_rng(0)


def logits(rows=4, vocab=11):
    return RNG.normal(size=(rows, vocab)).astype(np.float32)


# measures


def test_equal_rows():
    a = logits()
    found = metrics.compare_logits(a, a.copy())
    np.testing.assert_allclose(found["cosine"], 1, atol=1e-15)
    assert not found["max_abs"].any() and not found["kl"].any() and found["agree"].all()


def test_measures_by_their_definition():
    a = logits()
    b = logits()
    found = metrics.compare_logits(a, b)
    x = a.astype(np.float64)
    y = b.astype(np.float64)
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (x, y))
    np.testing.assert_allclose(
        found["cosine"], [u @ v / np.sqrt(u @ u * (v @ v)) for u, v in zip(x, y)]
    )
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(1))
    np.testing.assert_allclose(found["mean_abs"], np.abs(x - y).mean(1))
    assert found["agree"].tolist() == (a.argmax(1) == b.argmax(1)).tolist()


def test_golden_zeros_count():
    a = np.zeros((1, 4), np.float32)
    b = np.array([[0, 0, 0, 2]], np.float32)
    found = metrics.compare_rows(a, b)
    assert (found["max_abs"][0], found["mean_abs"][0], found["cosine"][0]) == (2, 0.5, 0)
    assert metrics.compare_rows(a, a)["cosine"][0] == 1


def test_large_logits_do_not_overflow():
    a = np.array([[6e4, -6e4, 0]], np.float32)
    assert metrics.compare_logits(a, a)["kl"][0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_rows_are_counted_and_poison_the_summary(bad):
    a = logits()
    b = logits()
    b[2, 3] = bad
    summary = metrics.summarize([metrics.compare_logits(a, b)])
    assert (
        summary["nonfinite"] == 1
        and np.isnan(summary["cosine_min"])
        and np.isnan(summary["kl_max"])
    )
    assert summary["worst"] == {"case": 0, "row": 2}
    assert summary["top1_agreement"] <= 0.75


def test_summary_over_several_comparisons():
    a = logits(3)
    b = logits(2)
    off = b.copy()
    off[1] = -off[1]
    summary = metrics.summarize([metrics.compare_rows(a, a), metrics.compare_rows(b, off)])
    assert (
        summary["rows"] == 5
        and summary["elements"] == 55
        and summary["worst"] == {"case": 1, "row": 1}
    )
    assert summary["cosine_min"] == pytest.approx(-1) and summary["max_abs"] == pytest.approx(
        2 * np.abs(b[1]).max()
    )


def test_nothing_compared_and_shapes_that_differ():
    assert metrics.summarize([]) == {"rows": 0}
    assert metrics.summarize([metrics.compare_rows(np.zeros((0, 4)), np.zeros((0, 4)))]) == {
        "rows": 0
    }
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.compare_rows(logits(3), logits(4))


# verdict and files

TOKENS = {0: "<script>", 1: "\n     ", 3: "你"}
FAMILY = SimpleNamespace(
    name="fake",
    vision=None,
    languages=("zh", "en"),
    stop_ids=(2,),
    tokenizer=SimpleNamespace(decode=lambda ids: TOKENS.get(ids[0], "x")),
)
INFO = {
    "model": "/m",
    "sha256": "0" * 64,
    "family": "fake",
    "stages": ["decoder: fake"],
    "options": {"dtype": "auto"},
    "load_seconds": 0.1,
    "picture_process_time": 0.25,
}


def found_with(a, b, threshold=0.9999, features=None):
    pictures = [] if features is None else [questions.shapes()]
    pair = [
        outcomes.Side(
            dict(INFO), FAMILY, [outcomes.Outcome([1, 2], f, list(range(len(x))), "你 <b>", x)]
        )
        for x, f in zip((a, b), features or [np.zeros((0, 8), np.float32)] * 2)
    ]
    limits = dict.fromkeys(("vision", "decode"), {"cosine_min": threshold}) | {"layers": {}}
    found = verdict.judge(*pair, [cases.Case("<i>什么？", None, pictures)], limits)
    return {
        **found,
        "command": "c",
        "environment": {"python": "3"},
        "options": {"max_tokens": 4},
        "culprit": None,
        "dataset": None,
        "vision_node": None,
    }


def test_passes_and_fails_by_the_smallest_cosine():
    a = logits()
    assert found_with(a, a + 1e-6)["passed"]
    b = a.copy()
    b[3] += 0.2 * RNG.normal(size=b.shape[1]).astype(np.float32)
    found = found_with(a, b)
    assert (
        not found["passed"]
        and "decoder logits falls to 0.9" in found["verdict"]
        and "token 4" in found["verdict"]
    )
    assert found_with(a, b, threshold=0.5)["passed"]


def test_a_difference_in_the_pictures_fails_too():
    a = logits()
    rows = logits(2, 8)
    found = found_with(a, a, features=(rows, rows[::-1]))
    assert not found["passed"] and "vision features" in found["verdict"]
    assert [(c["stage"], c["passed"]) for c in found["checks"]] == [
        ("vision", False),
        ("vision", False),
        ("decode", True),
    ]


def test_nan_fails_and_is_null_in_json(tmp_path):
    a = logits()
    b = a.copy()
    b[1, 1] = np.nan
    found = found_with(a, b)
    assert not found["passed"] and "NaN or Inf" in found["verdict"]
    report.write(found, [[]], tmp_path)
    stored = json.loads(
        (tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    assert stored["cases"][0]["tokens"][1]["cosine"] is None and stored["schema"] == report.SCHEMA


def test_nothing_compared_fails():
    found = found_with(logits(0), logits(0))
    assert not found["passed"] and found["verdict"] == "FAILED: nothing was compared"


def test_page_is_self_contained_and_escaped(tmp_path):
    a = logits()
    rows = logits(2, 8)
    report.write(found_with(a, a, features=(rows, rows)), [[questions.house()]], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#|["']?#)[^"'\s)>]+""", page)
    assert not re.findall(r"https?://(?!www\.w3\.org)", page) and page.count("<script") == 1
    assert (
        "&lt;i&gt;什么？" in page and "data:image/jpeg;base64," in page and page.count("<svg") == 4
    )
    assert page.count('lang="zh"') > 30
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "layers.csv",
        "report.html",
        "report.json",
    ]


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chromium"
)
def test_page_in_a_browser(tmp_path):
    """A phone's width: the page is drawn, and the console stays silent (it would name a missing resource, too)."""
    a = logits()
    rows = logits(2, 8)
    report.write(found_with(a, a + 0.01, features=(rows, rows)), [[questions.house()]], tmp_path)
    run = subprocess.run(
        [
            shutil.which("chromium") or "google-chrome",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--window-size=390,900",
            f"--screenshot={tmp_path / 'page.png'}",
            f"file://{tmp_path / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "CONSOLE" not in run.stderr and "net::ERR" not in run.stderr
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_numbers_are_cut_not_rounded():
    assert formats.cosine(0.999899999999) == "0.99989999" and formats.percent(0.9999) == "99.9 %"
    assert (
        formats.percent(1.0) == "100 %"
        and formats.cosine(float("nan")) == "NaN"
        and formats.number(0.0) == "0"
    )


def test_blanks_of_a_token_are_visible():
    assert report.visible("a b\n") == "a␣b⏎" and report.visible(" " * 9) == "␣×9"
    assert report.visible("\x1b[31m") == "\\x1b[31m" and report.visible("") == "∅"


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_out_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ToolkitError, match="--out .* cannot be written"):
        files.prepare(str(tmp_path / "file" / ("" if kind == "file" else "x")))


# questions


def options(**given):
    return CompareOptions(model=str(GOLDEN), out="o", **given)


def test_builtin_questions():
    seeing = cases.choose_cases(options(), SimpleNamespace(vision=True, languages=("zh", "en")))
    assert [(c.language, len(c.images)) for c in seeing] == [
        ("zh", 1),
        ("en", 1),
        ("zh", 0),
        ("en", 0),
    ]
    blind = cases.choose_cases(options(), SimpleNamespace(vision=None, languages=("zh",)))
    assert [(c.language, c.images) for c in blind] == [("zh", []), (None, [])]


def test_own_questions_and_pictures():
    family = SimpleNamespace(vision=True, languages=("zh", "en"))
    assert [c.question for c in cases.choose_cases(options(prompt=["a", "b"]), family)] == [
        "a",
        "b",
    ]
    mine = cases.choose_cases(options(image=["p.png"], language="en"), family)
    assert [(c.language, c.images) for c in mine] == [("en", ["p.png"])] * 2


# the command


def run(out, *argv):
    return run_command(
        compare.main, ["--model", str(GOLDEN), "--out", str(out), "--vision", "torch", *argv]
    )


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--device", "0"], "--device npu:0 needs torch_npu"),
        (["--reference-device", "0"], "--reference-device npu:0 needs torch_npu"),
        (["--vision", "om"], "needs ais_bench"),
    ],
)
def test_what_is_missing_is_said_before_the_reference_is_loaded(argv, sentence, tmp_path, capsys):
    assert run(tmp_path, *argv) == 3
    told = capsys.readouterr().err
    assert sentence in told.splitlines()[-1] and "reference: loading" not in told


def test_the_reference_runs_on_the_device_asked_for(tmp_path, monkeypatch, capsys):
    devices = []

    def opened(model, options):
        devices.append((options.device, options.ops))
        raise ToolkitError("--device npu:1: seen enough")

    monkeypatch.setattr(components, "choose", lambda *asked: None)
    monkeypatch.setattr(runs, "open_engine", opened)
    assert run(tmp_path, "--reference-device", "1") == 2
    assert devices == [("npu:1", "reference")]
    assert "--reference-device npu:1: seen enough" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--layer-by-layer"], ["--reference", "transformers"]])
def test_references_that_run_on_the_cpu_only(argv, tmp_path, capsys):
    assert run(tmp_path, "--reference-device", "cuda:0", *argv) == 2
    assert "--reference-device is 'cuda:0'" in capsys.readouterr().err


def test_command_passes(tmp_path, capsys):
    assert run(tmp_path / "new" / "report", "--max-tokens", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"report: {tmp_path}/new/report/report.html"
    assert lines[-1].startswith("PASSED: no cosine is below 0.9999")
    stored = json.loads((tmp_path / "new" / "report" / "report.json").read_text(encoding="utf-8"))
    assert stored["stages"]["decode"]["rows"] == 12 and stored["stages"]["vision"]["rows"] == 64
    assert (
        stored["reference"]["sha256"] == stored["candidate"]["sha256"]
        and len(stored["reference"]["sha256"]) == 64
    )


def test_a_limit_of_ones_own(tmp_path, capsys):
    assert (
        run(
            tmp_path,
            "--prompt",
            "你好",
            "--max-tokens",
            "2",
            "--dtype",
            "bf16",
            "--limit",
            "decode.kl-max=1e-12",
        )
        == 1
    )
    assert "kl_max of the decoder logits is" in capsys.readouterr().out


def test_command_fails_below_the_threshold(tmp_path, capsys):
    assert (
        run(
            tmp_path,
            "--dtype",
            "bf16",
            "--prompt",
            "你好",
            "--max-tokens",
            "8",
            "--threshold",
            "0.9999999",
        )
        == 1
    )
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("FAILED: the cosine of the decoder logits falls to")
    )
    assert not json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["passed"]


DEMO = GOLDEN.parents[2] / "examples" / "demo"


def test_dataset(tmp_path, capsys):
    """The demo's scenes: open questions, and choices by probability; the pictures stand beside the file."""
    folder = DEMO / "pictures"
    file = tmp_path / "questions.jsonl"
    lines = [
        json.loads(line)
        for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    ]
    lines += [
        {**lines[0], "choices": ["red", lines[0]["answer"], "green circle"]},
        {**lines[1], "answer": "错"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for picture in folder.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    argv = [
        "--model",
        str(DEMO / "checkpoint"),
        "--vision",
        "torch",
        "--prompt",
        "你好",
        "--max-tokens",
        "16",
        "--dataset",
        str(file),
        "--out",
        str(tmp_path / "out"),
    ]
    assert run_command(compare.main, argv) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["dataset"]
    assert (
        found["questions"] == 6
        and found["reference"] == found["candidate"] == 5 / 6
        and found["same"] == 1
    )
    assert "dataset: 6 questions, right: reference 83.3 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        ({"prompt": "x"}, 'no "answer" text'),
        ({"prompt": "x", "answer": 5}, 'no "answer" text'),
        ({"prompt": "x", "answer": "a", "choices": ["b"]}, "none of the choices"),
        ({"prompt": "x", "answer": "blue", "choices": "blue"}, '"choices" is not a list'),
        ({"prompt": "x", "answer": "b", "choices": 5}, '"choices" is not a list'),
        ({"prompt": "x", "answer": "b", "choices": ["b", 5]}, '"choices" is not a list'),
        ({"prompt": "x", "answer": "b", "choices": ["b", " "]}, '"choices" is not a list'),
        ({"prompt": "x", "answer": "b", "choices": {"b": 1}}, '"choices" is not a list'),
        ({"prompt": "x", "answer": "b", "language": 5}, '"language" is not a text'),
        ({"prompt": "x", "answer": "b", "image": "none.png"}, "does not exist"),
        ({"prompt": "x", "answer": "b", "image": "/etc/passwd"}, "--allowed-local-media-path"),
        ("no json", "no JSON"),
    ],
)
def test_dataset_without_answers(line, words, tmp_path, capsys):
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "d.jsonl").write_text('{"prompt": "x", "answer": "y"}\n\n' + text + "\n")
    assert run(tmp_path / "out", "--dataset", str(tmp_path / "d.jsonl")) == 2
    shown = capsys.readouterr().err
    assert "line 3, question 2: " in shown and words in shown


def test_a_full_disk_is_found_before_the_streams_are_written(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        assert size >= 4 * 2 * 3 * 4
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layerwise.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        layerwise.RecordingTap(tmp_path / "s.npy", ["a", "b"], 3, 4)
    assert error.value.filename == str(tmp_path / "s.npy")


def test_dataset_with_half_an_emoji(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        r'{"prompt": "cut \ud83d", "answer": "y\ud83d", "choices": null}' + "\n"
    )
    [question] = read_dataset(str(tmp_path / "d.jsonl"))
    assert (question["prompt"], question["answer"]) == ("cut \ufffd", "y\ufffd")


def test_answers_that_differ():
    from runtime.compare.dataset import summary

    found = summary(
        "f",
        [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": "b"}],
        ["a", "b"],
        ["a", "c"],
    )
    assert (found["reference"], found["candidate"], found["same"]) == (1, 0.5, 0.5)
    assert found["differences"] == [
        {"question": 2, "prompt": "q", "answer": "b", "reference": "b", "candidate": "c"}
    ]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--limit", "decode.nothing=1"), "names no measure of a stage"),
        (("--limit", "decode.kl_max=x"), "has no number"),
        (("--dataset", "none.jsonl"), "does not exist"),
        (("--reference", "transformers", "--search"), "needs a reference checkpoint"),
        (
            ("--reference", str(GOLDEN.parent / "glm_edge")),
            "is a glm-edge model, --model a visualglm model",
        ),
        (("--image", "none.png"), "picture none.png does not exist"),
        (("--max-tokens", "999999"), "maximum length"),
        (("--image", str(GOLDEN / "config.json")), "is not a picture"),
    ],
)
def test_mistakes(argv, sentence, tmp_path, capsys):
    assert run(tmp_path, *argv) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ") and sentence in shown
    assert not list(tmp_path.iterdir())
