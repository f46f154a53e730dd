"""predict: order, failures per line, resuming after kill -9, and the guide's modes."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import paths
import pytest

from models.errors import ModelError
from models.prompt.images import open_image
from runtime.__main__ import main as runtime_main
from runtime.common.errors import ToolkitError, run_command
from runtime.common.jsonl import Line
from runtime.predict import __main__ as predict
from runtime.predict import against as against_module
from runtime.predict import answer_file
from runtime.predict.against import Answer
from runtime.predict.parting import Parting, find_parting
from runtime.predict.questions import chat_messages, read_question

KILLS = int(os.environ.get("PREDICT_KILLS", 3))
ROOT = paths.ROOT
GOLDEN = paths.GOLDEN / "visualglm"
FIXED = ["--vision", "torch", "--temperature", "0", "--max-tokens", "3", "--max-model-len", "256"]
TIMES = ("seconds", "picture_process_time")


def argv(file, out, *more):
    return ["--model", str(GOLDEN), "--input", str(file), "--out", str(out), *FIXED, *more]


def run(file, out, *more):
    return run_command(predict.main, argv(file, out, *more))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path):
    return [
        {name: value for name, value in line.items() if name not in TIMES} for line in lines(path)
    ]


def written(folder, questions):
    file = folder / "in.jsonl"
    file.write_text(
        "".join((q if isinstance(q, str) else json.dumps(q)) + "\n" for q in questions),
        encoding="utf-8",
    )
    return file


MIXED = [
    {"prompt": "你好", "id": 7},
    {"prompt": "What is this?", "image": "image.png"},
    "no json",
    {"image": "image.png"},
    {"prompt": "And?", "history": [["What is this?", "A cat."]], "image": ["image.png"]},
    {"prompt": "x", "image": "none.png"},
    {"prompt": "long " * 300},
    {"prompt": "x", "language": "fr"},
    {"prompt": "x", "history": ["y"]},
    {"prompt": "last", "language": "en"},
]


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "image.png").write_bytes((GOLDEN / "image.png").read_bytes())
    return written(tmp_path, MIXED)


def test_in_order_with_failures_per_line(mixed, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(mixed, out) == 1
    found = lines(out)
    assert [i for i, line in enumerate(found) if "error" in line] == [2, 3, 5, 6, 7, 8]
    assert found[0]["id"] == 7 and [line.get("prompt") for line in found[9:]] == ["last"]
    assert all(
        line["output_tokens"] == 3 and line["finish_reason"] == "length"
        for line in found
        if "answer" in line
    )
    for index, reason in [
        (2, "no JSON"),
        (3, 'no "prompt"'),
        (5, "none.png"),
        (6, "maximum length"),
        (7, "'fr'"),
        (8, "history"),
    ]:
        assert reason in found[index]["error"]
    shown = capsys.readouterr()
    assert (
        shown.out.splitlines()[-1] == f"{out}: 10 lines, 6 failed"
        and "[6/10] failed: " in shown.err
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.png", "in.jsonl", "out.jsonl"]


def test_history_and_pictures_count(mixed, tmp_path):
    run(mixed, tmp_path / "a.jsonl")
    from runtime import Engine, SamplingParams

    engine = Engine(GOLDEN, vision="torch", max_model_len=256)
    image = {"type": "image", "image": str(GOLDEN / "image.png")}
    prompt = engine.prompt(
        [
            {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And?"},
        ]
    )
    expected = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=3))[0].text
    assert lines(tmp_path / "a.jsonl")[4]["answer"] == expected


def test_together_or_one_by_one(mixed, tmp_path):
    assert (
        run(mixed, tmp_path / "a.jsonl")
        == run(mixed, tmp_path / "b.jsonl", "--batch-size", "4")
        == 1
    )
    assert answers(tmp_path / "a.jsonl") == answers(tmp_path / "b.jsonl")


def test_killed_at_random_moments(tmp_path):
    """200 lines, kill -9 again and again; the file is the one of an undisturbed run."""
    file = written(tmp_path, [{"prompt": f"What is {i}?", "id": i} for i in range(200)])
    assert run(file, tmp_path / "whole.jsonl", "--batch-size", "3") == 0
    step = (tmp_path / "whole.jsonl").stat().st_size // KILLS // 2
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    moments = random.Random(3)
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.predict", *argv(file, out, "--batch-size", "3")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        goal = (partial.stat().st_size if partial.exists() else 0) + moments.randrange(1, step)
        while process.poll() is None and (not partial.exists() or partial.stat().st_size < goal):
            time.sleep(moments.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        if kill % 2:  # as if the machine died in the middle of a write
            os.truncate(partial, max(partial.stat().st_size - moments.randrange(200), 0))
    assert run(file, out, "--batch-size", "3") == 0
    assert answers(out) == answers(tmp_path / "whole.jsonl") and [
        line["id"] for line in lines(out)
    ] == list(range(200))
    assert not partial.exists()


def test_every_place_a_partial_file_can_end(mixed, tmp_path):
    run(mixed, tmp_path / "whole.jsonl")
    job = (
        json.dumps(
            answer_file.job_description(
                *predict.parser().parse(argv(mixed, tmp_path / "out.jsonl"))
            )
        )
        + "\n"
    )
    content = job.encode() + (tmp_path / "whole.jsonl").read_bytes()
    for end in (0, 5, len(job), len(job) + 10, len(content) // 2, len(content) - 1, len(content)):
        (tmp_path / "out.jsonl.partial").write_bytes(content[:end])
        assert run(mixed, tmp_path / "out.jsonl") == 1
        assert answers(tmp_path / "out.jsonl") == answers(tmp_path / "whole.jsonl")
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--temperature", "0.5"], "begun with another model, input or other options"),
        ([], "another process is writing"),
    ],
)
def test_a_partial_file_that_is_not_ours(change, sentence, mixed, tmp_path, capsys):
    job = answer_file.job_description(*predict.parser().parse(argv(mixed, tmp_path / "out.jsonl")))
    with answer_file.open_answer_file(tmp_path / "out.jsonl", job) as held:
        held.stream.flush()
        if change:
            held.stream.close()
        assert run(mixed, tmp_path / "out.jsonl", *change) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--input", "none.jsonl", "--out", "o"], "no such file"),
        ([], "give either --input FILE --out FILE, or --examples"),
        (["--input", __file__], "--out is None"),
        (["--input", __file__, "--out", "no/folder/o"], "its folder does not exist"),
        (["--input", __file__, "--out", __file__], "exists already"),
        (["--examples", "--batch-size", "0"], "1 or more"),
    ],
)
def test_mistakes(given, sentence, capsys):
    assert run_command(predict.main, ["--model", str(GOLDEN), *given]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("field", ["history", "image", "language", "lang"])
@pytest.mark.parametrize("value", [5, 0, False, {}, {"a": 1}, [5], [["a"]], [["a", 5]], [None]])
def test_a_field_of_another_type_is_an_error_of_its_line(field, value):
    error = read_question(Line(1, {"prompt": "x", field: value, "id": 7}))
    assert f'"{field}" is n' in str(error) and error.fields["id"] == 7


@pytest.mark.parametrize("value", [None, ""])
def test_null_and_empty_text_stand_for_nothing(value, tmp_path):
    fields = dict.fromkeys(("history", "image", "language", "lang"), value)
    question = read_question(Line(1, {"prompt": "x", **fields}))
    [message] = chat_messages(question, tmp_path)
    assert message["content"] == [{"type": "text", "text": "x"}]


def test_one_bad_line_fails_alone_with_its_id(tmp_path, capsys):
    deep = '{"prompt": "x", "a": ' + "[" * 200 + "]" * 200 + "}"
    file = written(
        tmp_path,
        [
            "\ufeff" + json.dumps({"id": 1, "prompt": "hi"}),
            r'{"id": "caf\udce9", "prompt": "cut \ud83d", "history": [["\ud83d", "\ude00"]]}',
            "   ",
            deep,
            "[" * 100_000,
            "[1, 2]",
            '"text"',
            {"id": [4], "prompt": 5},
            {"id": 5, "prompt": "x", "image": ["a.png", 5]},
            {"id": 6, "prompt": "x", "image": r"\ud800.png"},
            {"id": 7, "prompt": "x", "image": "a\0b"},
            "9" * 5000,
            "\ufeff" + json.dumps({"id": 8, "prompt": "hi"}),
        ],
    )
    with open(file, "ab") as stream:
        stream.write(b'{"id": 9, "prompt": "\xed\xa0\xbd"}\r\n\xe3\x80\x80\n')
    assert run(file, tmp_path / "out.jsonl") == 1
    found = lines(tmp_path / "out.jsonl")
    assert "Traceback" not in capsys.readouterr().err
    failed = [number for number, line in enumerate(found) if "error" in line]
    assert len(found) == 13 and failed == [2, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    assert [line.get("id") for line in found if "id" in line] == [
        1,
        "caf\udce9",
        [4],
        5,
        6,
        7,
        8,
        9,
    ]
    assert "nested deeper than 100" in found[2]["error"] and "no JSON" in found[10]["error"]
    assert "is not UTF-8 text (byte 21" in found[12]["error"]
    assert found[0]["answer"] == found[11]["answer"]


def test_half_an_emoji_is_asked_as_the_replacement_character(tmp_path):
    questions = [r'{"prompt": "cut \ud83d"}', {"prompt": "cut \ufffd"}]
    run(written(tmp_path, questions), tmp_path / "out.jsonl")
    half, replaced = answers(tmp_path / "out.jsonl")
    assert half["answer"] == replaced["answer"] and half["prompt"] == "cut \ud83d"


def test_output_of_an_earlier_run_as_input(mixed, tmp_path):
    assert run(mixed, tmp_path / "first.jsonl") == 1
    (tmp_path / "none.png").write_bytes((GOLDEN / "image.png").read_bytes())
    first = lines(tmp_path / "first.jsonl")
    again = written(tmp_path, [line for line in first if "prompt" in line and "id" not in line])
    run(again, tmp_path / "second.jsonl")
    mended = [line for line in lines(tmp_path / "second.jsonl") if line.get("image") == "none.png"]
    assert "error" not in mended[0] and mended[0]["output_tokens"] == 3
    stale = written(tmp_path, [{"prompt": "x", "language": "fr", "answer": "old", "seconds": 1}])
    run(stale, tmp_path / "third.jsonl")
    [failed] = lines(tmp_path / "third.jsonl")
    assert set(failed) == {"prompt", "language", "error"}


@pytest.fixture
def outside(tmp_path):
    """A jsonl file whose pictures lie elsewhere, beside what it may name."""
    (tmp_path / "questions").mkdir()
    (tmp_path / "pictures").mkdir()
    picture = (GOLDEN / "image.png").read_bytes()
    (tmp_path / "pictures" / "a.png").write_bytes(picture)
    (tmp_path / "questions" / "b.png").write_bytes(picture)
    (tmp_path / "questions" / "inner.png").symlink_to("b.png")
    (tmp_path / "questions" / "link.png").symlink_to(tmp_path / "pictures" / "a.png")
    (tmp_path / "questions" / "up").symlink_to(tmp_path)
    return tmp_path / "questions"


@pytest.mark.parametrize(
    "name",
    [
        "../pictures/a.png",
        "{}/pictures/a.png",
        "link.png",
        "up/pictures/a.png",
        "file://{}/pictures/a.png",
        "file:../pictures/%61.png",
    ],
)
def test_pictures_are_confined_to_the_folder_of_the_file(name, outside):
    name = name.format(outside.parent)
    question = {"prompt": "x", "image": [name]}
    with pytest.raises(ModelError, match="lies outside .*: --allowed-local-media-path DIR"):
        chat_messages(question, outside)
    with pytest.raises(ModelError, match="lies outside"):
        chat_messages(question, outside, outside.parent / "questions")
    [message] = chat_messages(question, outside, outside.parent / "pictures")
    [picture, _] = message["content"]
    assert os.fspath(picture["image"]) == str(outside.parent / "pictures" / "a.png")


@pytest.mark.parametrize(
    "name",
    [
        "b.png",
        "./b.png",
        "inner.png",
        "{}/questions/b.png",
        "file://{}/questions/b.png",
        "file://b.png",
    ],
)
def test_pictures_of_the_folder(name, outside):
    question = {"prompt": "x", "image": name.format(outside.parent)}
    [message] = chat_messages(question, outside)
    assert os.fspath(message["content"][0]["image"]) == str(outside / "b.png")


def link_in_its_place(name, target):
    name.rename(name.with_name("before"))
    name.symlink_to(target)


@pytest.mark.parametrize("swapped", ["b.png", "inner"])
def test_a_link_that_comes_after_the_check_is_not_followed(swapped, outside):
    (outside / "inner").mkdir()
    (outside / "inner" / "a.png").write_bytes((outside / "b.png").read_bytes())
    names = ["b.png", "inner/a.png"]
    [message] = chat_messages({"prompt": "x", "image": names}, outside)
    pictures = [part["image"] for part in message["content"] if part["type"] == "image"]
    targets = {"b.png": outside.parent / "pictures" / "a.png", "inner": outside.parent / "pictures"}
    link_in_its_place(outside / swapped, targets[swapped])
    whole, exchanged = pictures if swapped == "inner" else reversed(pictures)
    open_image(whole)
    with pytest.raises(ModelError, match="was exchanged for a link while it was read"):
        open_image(exchanged)


def test_a_pipe_that_comes_after_the_check_is_not_opened(outside):
    [message] = chat_messages({"prompt": "x", "image": "b.png"}, outside)
    (outside / "b.png").unlink()
    os.mkfifo(outside / "b.png")
    with pytest.raises(ModelError, match="b.png is a named pipe; name a picture file"):
        open_image(message["content"][0]["image"])


def test_the_flag_opens_another_folder(outside, capsys):
    file = written(outside, [{"prompt": "x", "image": "../pictures/a.png"}])
    assert run(file, outside / "closed.jsonl") == 1
    allowed = ["--allowed-local-media-path", str(outside.parent / "pictures")]
    assert run(file, outside / "open.jsonl", *allowed) == 0
    assert run(file, outside / "o.jsonl", "--allowed-local-media-path", "nowhere") == 2
    assert "--allowed-local-media-path is 'nowhere': there is no such folder" in (
        capsys.readouterr().err
    )


def test_the_partial_file_is_no_link(mixed, tmp_path, capsys):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("all of it")
    (tmp_path / "out.jsonl.partial").symlink_to(thesis)
    assert run(mixed, tmp_path / "out.jsonl") == 2
    assert "is a link" in capsys.readouterr().err and thesis.read_text() == "all of it"


def test_a_full_disk_is_named(mixed, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(answer_file.os, "fsync", full)
    assert run(mixed, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"No space left on device: {tmp_path}/out.jsonl.partial" in error
    assert "run the same command again" in error
    monkeypatch.undo()
    assert run(mixed, tmp_path / "out.jsonl") == 1
    assert len(lines(tmp_path / "out.jsonl")) == len(MIXED)


@pytest.mark.parametrize("content", ["é".encode("utf-16"), "你好".encode("gbk"), b"\xff\n\xff\n"])
def test_another_encoding(content, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(content)
    assert run(tmp_path / "in.jsonl", tmp_path / "o.jsonl") == 2
    assert "is not UTF-8 text; save it as UTF-8 jsonl" in capsys.readouterr().err


def test_empty_input(tmp_path, capsys):
    assert run(written(tmp_path, ["", " "]), tmp_path / "o.jsonl") == 2
    assert "holds no questions" in capsys.readouterr().err


# the guide's modes


def mode(*more):
    return run_command(runtime_main, ["--model_path", str(GOLDEN), *more])


def test_predict_mode_shows_three_examples(capsys):
    assert mode("--mode", "predict", *FIXED) == 0
    shown = capsys.readouterr()
    assert (
        shown.out.count("执行时间") == 3
        and shown.out.count("非首次执行时间") == 2
        and "这是什么东西" in shown.out
    )
    assert "drawn pictures are used" in shown.err


def test_precision_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        mode("--mode=precision", "--vision", "torch", "--prompt", "你好", "--max-tokens", "2") == 0
    )
    assert (tmp_path / "precision_report" / "report.json").exists()


def test_run_mode(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert mode("--mode", "run", *FIXED, "--prompt", "你好") == 0
    assert "answer 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--mode", "fly"], "--mode is 'fly': use one of run, performance"),
        ([], "--mode is None"),
        (["--mode"], "--mode is ''"),
    ],
)
def test_modes_that_do_not_exist(given, sentence, capsys):
    assert mode(*given) == 2
    assert sentence in capsys.readouterr().err


def test_the_time_of_pictures_is_written(tmp_path, capsys):
    picture = {"prompt": "hi", "image": "image.png"}
    shutil.copy(GOLDEN / "image.png", tmp_path)
    file = written(tmp_path, [picture, {"prompt": "hi"}, picture])
    assert run(file, tmp_path / "out.jsonl") == 0
    times = [line["picture_process_time"] for line in lines(tmp_path / "out.jsonl")]
    assert times[0] > 0 and times[1:] == [0, 0]  # the second time it is known
    assert run_command(predict.main, ["--model", str(GOLDEN), "--examples", *FIXED]) == 0
    assert capsys.readouterr().out.count("(picture process time: 0.") == 3


@pytest.mark.parametrize(
    ("more", "sequences"),
    [((), 1), (("--batch-size", "3"), 3), (("--batch-size", "2", "--max-num-seqs", "5"), 5)],
)
def test_the_cache_holds_what_is_answered_together(more, sequences, tmp_path, monkeypatch):
    opened = []

    def open_engine(model, options):
        opened.append(options.max_num_seqs)
        raise ToolkitError("opened")

    monkeypatch.setattr(predict.predictor, "open_engine", open_engine)
    file = written(tmp_path, [{"prompt": "hi"}])
    assert run(file, tmp_path / "out.jsonl", *more) == 2
    assert opened == [sequences]


# --against


def against(*more):
    """(exit code) of the two questions, greedily."""
    return run_command(predict.main, ["--model", str(GOLDEN), *FIXED, *more])


@pytest.fixture
def two_questions(tmp_path):
    shutil.copy(GOLDEN / "image.png", tmp_path)
    return written(tmp_path, [{"prompt": "hi"}, {"prompt": "what?", "image": "image.png"}, "no"])


def test_both_sides_agree(two_questions, tmp_path, capsys):
    report = tmp_path / "report.html"
    files = ["--input", str(two_questions), "--report", str(report)]
    assert against(*files, "--against", "cpu") == 0
    out = capsys.readouterr().out
    assert "2 of 3 answers are the same" in out and "no JSON" in out
    page = report.read_text(encoding="utf-8")
    assert page.count("The same answer.") == 2 and "cpu (--against)" in page


def test_the_first_token_at_which_they_part(two_questions, tmp_path, monkeypatch, capsys):
    """The other side is the same model with other weights in its last norm."""
    real = against_module.open_engine
    opened = []

    def other(model, options):
        engine = real(model, options)
        if opened:
            engine.decoder.final_norm.weight.mul_(-1)
        opened.append(engine.score(engine.prompt([{"role": "user", "content": "hi"}]), [0])[0])
        return engine

    monkeypatch.setattr(against_module, "open_engine", other)
    report = tmp_path / "report.html"
    files = ["--input", str(two_questions), "--report", str(report)]
    assert against(*files, "--against", "cpu") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("[1/3] parts at token 0: cpu ")
    ours, theirs = opened
    assert np.argmax(ours) != np.argmax(theirs) and "0 of 3 answers are the same" not in first
    assert "logit gap" in report.read_text(encoding="utf-8")


def test_where_tokens_part_and_the_gaps():
    family = SimpleNamespace(
        stop_ids=(9,), tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    )
    ours = Answer("12", [1, 2, 9], [{1: -0.1, 3: -2.0}, {2: -0.5, 3: -1.5}])
    theirs = Answer("13", [1, 3, 4], [{1: -0.1}, {3: -0.25, 2: -3.25}, {4: 0.0}])
    assert find_parting(family, ours, theirs) == Parting(1, ("2", "3"), (1.0, 3.0))
    assert find_parting(family, ours, ours) is None
    ended = Answer("1", [1, 9], [{1: -0.1, 3: -2.0}])
    assert find_parting(family, ours, ended) == Parting(1, ("2", "end of the answer"), (None, None))
    text = Answer("13 and more")
    assert find_parting(family, ours, text) == Parting(1, ("2", "3 and more"), (1.0, None))
    assert find_parting(family, ours, Answer("12")) is None


def test_against_a_file(two_questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(two_questions, out) == 1  # one line is no question
    answered = [line for line in lines(out) if "answer" in line]
    answered[1]["answer"] = "something else"
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answered))
    (tmp_path / "two.jsonl").write_text("\n".join(two_questions.read_text().splitlines()[:2]))
    files = ["--input", str(tmp_path / "two.jsonl"), "--report", str(tmp_path / "r.html")]
    assert against(*files, "--against", str(tmp_path / "theirs.jsonl")) == 0
    told = capsys.readouterr().out
    assert "1 of 2 answers are the same" in told and "(gap unknown)" in told
    files[1] = str(two_questions)
    assert against(*files, "--against", str(tmp_path / "theirs.jsonl")) == 2
    assert "has 2 answers, --input has 3 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--examples", "--against", "none.jsonl"], "there is no such file"),
        (["--examples", "--against", "gcu"], "--against is 'gcu'"),
        (["--examples", "--against", "cpu", "--engine", "ray"], "--engine is 'ray'"),
    ],
)
def test_mistakes_of_against(argv, sentence, capsys):
    assert against(*argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_partial_file_that_is_a_link_is_refused(tmp_path, capsys):
    file = written(tmp_path, [{"prompt": "hello"}])
    thesis = tmp_path / "thesis"
    thesis.write_text("the only copy")
    (tmp_path / "out.jsonl.partial").symlink_to(thesis)
    assert run(file, tmp_path / "out.jsonl") == 2
    assert "out.jsonl.partial is a link" in capsys.readouterr().err
    assert thesis.read_text() == "the only copy"
