"""Lines of jsonl files: what is no line is said by its number and kept apart from the others."""

import gzip
import json

import pytest

from runtime.common.errors import ToolkitError
from runtime.common.jsonl import as_line, read_lines


def lines_of(tmp_path, data: bytes):
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    return read_lines(str(file), "--input")


@pytest.mark.parametrize(
    ("line", "id", "words"),
    [
        (b'{"id": 7, "prompt": "a"}{"id": 8}', 7, "two JSON values in one line"),
        (b'{"id": 7}\r{"id": 8}', 7, "in front of character 11"),
        (b'{"id": "x\\"y", "prompt": "cut', 'x"y', "no JSON (Unterminated string"),
        (b'{"id": 7, "prompt": "caf\xe9"}', 7, "not UTF-8 text (byte 24"),
        (b'{"id": 7, "score": NaN}', 7, "NaN is no number of JSON; write null"),
        (b'{"id": 7, "score": -Infinity}', 7, "-Infinity is no number of JSON"),
        (b'{"id": 7, "score": 1e999}', 7, "the number 1e999 is too large"),
        (b'{"id": 7, "n": ' + b"9" * 5000 + b"}", 7, "has 5,000 digits; the limit is 1,000"),
        (b'{"id": 7, "a": ' + b"[" * 200 + b"]" * 200 + b"}", 7, "deeper than 100"),
        (b'{"id": ' + b"9" * 5000 + b"}", None, "5,000 digits"),
        (b"// a comment", None, "no JSON (Expecting value at character 1)"),
        (b"\0\0\0", None, "no JSON"),
    ],
)
def test_a_bad_line_says_why_and_keeps_its_id(line, id, words, tmp_path):
    found = lines_of(tmp_path, b'{"id": 1}\n' + line + b'\n{"id": 3}\n')
    assert [each.number for each in found] == [1, 2, 3]
    assert [each.problem for each in found[::2]] == [None, None]
    assert words in found[1].problem
    assert found[1].value == (None if id is None else {"id": id})


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"id": 1}\r\n\r\n   \r\n{"id": 1}\r\n',
        b'{"id": 1}\n\xef\xbb\xbf{"id": 1}',
        b'\n\n{"id": 1}\n\xe3\x80\x80\n{"id": 1}\n\n',
    ],
)
def test_marks_blank_lines_and_equal_ids(data, tmp_path):
    found = lines_of(tmp_path, data)
    assert [(line.value, line.problem) for line in found] == [({"id": 1}, None)] * 2


def test_texts_are_read_as_they_are_and_written_so_that_they_read_alike(tmp_path):
    values = [{"id": 2**300}, {"a": "\ud83d"}, {"a": "😀"}, {"a": "\u2028\x85\t"}, {"a": 1.5}]
    found = lines_of(tmp_path, b"".join(map(as_line, values)))
    assert [line.value for line in found] == values


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b'{"id": 1}\n', mtime=0), "is a gzip file; unpack it"),
        (b"PK\x03\x04rest", "is a zip file"),
        (b"PAR1rest", "is a parquet file"),
        (b'[{"id": 1}, {"id": 2}]', "one JSON list or object over the whole file"),
        (b'[{"id": 1},\n{"id": 2}]\n', "one object per line"),
        (json.dumps([{"id": 1}], indent=2).encode(), "one object per line"),
        (json.dumps({"id": 1}, indent=2).encode(), "one object per line"),
        ('{"id": 1}\n'.encode("utf-16"), "iconv -f UTF-16"),
        ('{"a": "你好"}\n'.encode("gbk"), "iconv -f GBK"),
    ],
)
def test_files_of_another_form_are_named(data, words, tmp_path):
    with pytest.raises(ToolkitError, match="--input .*a.jsonl") as caught:
        lines_of(tmp_path, data)
    assert words in str(caught.value)


def test_one_list_among_the_lines_is_a_line(tmp_path):
    assert [line.value for line in lines_of(tmp_path, b'[1]\n{"id": 1}\n')] == [[1], {"id": 1}]
