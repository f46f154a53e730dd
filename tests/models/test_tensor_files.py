"""Files for libraries in C++ and Rust, in locales that are no UTF-8."""

import os
import subprocess
import sys

import paths
import pytest
import torch

from models.checkpoint.tensor_files import load_tensors, save_tensors
from models.files import native_path

SCRIPT = """
import sys, torch
from models.checkpoint.tensor_files import load_tensors, save_tensors
save_tensors({"a": torch.ones(2)}, sys.argv[1])
print(load_tensors(sys.argv[1])["a"].tolist())
"""


@pytest.mark.parametrize("encoding", ["gbk", "utf-8"])
def test_tensor_files_in_a_folder_with_a_chinese_name(encoding, tmp_path):
    """The folder's name is written in the locale's bytes; Python takes them through surrogates."""
    folder = os.fsencode(tmp_path) + b"/" + "模型".encode(encoding)
    os.mkdir(folder)
    command = [sys.executable, "-X", "utf8=1", "-c", SCRIPT, folder + b"/x.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT)
    assert done.stdout == "[1.0, 1.0]\n", done.stderr


def test_native_path_is_the_path_where_the_locale_is_utf8(tmp_path):
    with native_path(tmp_path / "模型") as name:
        assert name == str(tmp_path / "模型")
    save_tensors({"a": torch.zeros(3)}, tmp_path / "x")
    assert torch.equal(load_tensors(tmp_path / "x")["a"], torch.zeros(3))
