"""Folders that are no checkpoint of ours are named for what they are, with what to do."""

import json
import shutil

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.errors import ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n"


def copied(tmp_path, name="glm_edge", weights=True):
    ignored = ["*.npz", "*.gz", "hf"] + ([] if weights else ["*.safetensors"])
    shutil.copytree(paths.GOLDEN / name, tmp_path / name, ignore=shutil.ignore_patterns(*ignored))
    return tmp_path / name


def use(folder):
    family = family_of(folder)
    Checkpoint(folder).check(family.weights())


@pytest.mark.parametrize(
    "file, words",
    [
        ("glm-edge-Q4_K_M.gguf", "GGUF file"),
        ("model.onnx", "ONNX model"),
        ("openvino_model.xml", "OpenVINO"),
        ("tf_model.h5", "TensorFlow weights"),
        ("flax_model.msgpack", "Flax weights"),
        ("model.ckpt-1.index", "checkpoint of MindSpore"),
        ("glm.nemo", "NeMo"),
        ("glm.rkllm", "Rockchip"),
        ("rank0.engine", "TensorRT-LLM"),
        ("mlc-chat-config.json", "MLC"),
        ("__0_0.distcp", "FSDP in training"),
        ("model.safetensors.incomplete", "download that is not finished"),
        ("model.safetensors.crdownload", "download that is not finished"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_what_is_there_instead_of_weights(tmp_path, file, words, with_config):
    folder = copied(tmp_path, weights=False)
    if not with_config:
        (folder / "config.json").unlink()
    (folder / file).write_text("x")
    with pytest.raises(ModelError, match=f"holds .*{words}.* \\({file}\\); "):
        use(folder)


def test_a_deepspeed_checkpoint_is_not_sat(tmp_path):
    folder = copied(tmp_path, weights=False)
    (folder / "latest").write_text("global_step100")
    (folder / "zero_to_fp32.py").touch()
    with pytest.raises(ModelError, match="DeepSpeed in training .* run its zero_to_fp32.py"):
        use(folder)


@pytest.mark.parametrize("file", ["glm.tar.gz", "glm.zip", "glm.tgz"])
def test_an_archive(tmp_path, file):
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match="holds an archive .*unpack it"):
        use(tmp_path)


@pytest.mark.parametrize(
    "inner", ["glm-edge-1.5b-chat", "models--THUDM--glm-edge/snapshots/abc", "checkpoint-200"]
)
def test_the_folder_inside_is_named(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True)
    (tmp_path / inner / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"use --model .*{inner}$"):
        use(tmp_path)


def test_a_file_is_no_folder():
    with pytest.raises(ModelError, match="is a file; give --model its folder, .*glm_edge$"):
        use(paths.GOLDEN / "glm_edge" / "model.safetensors")


@pytest.mark.parametrize("name", ["glm4", "visualglm"])
def test_chatglms_own_quantisation(tmp_path, name):
    folder = copied(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    for bits in (0, None):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_bit": bits}))
        use(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    with pytest.raises(ModelError, match=r"quantised by ChatGLM's own code \(quantization_bit 4"):
        use(folder)


@pytest.mark.parametrize(
    "ending, words",
    [
        ("SCB", "bitsandbytes"),
        ("weight_format", "bitsandbytes"),
        ("W_q", "HQQ"),
        ("lora_magnitude_vector", "LoRA that is not merged"),
        ("modules_to_save.default.weight", "adapter of PEFT that is not merged"),
        ("lora_A.weight", "LoRA that is not merged"),
    ],
)
def test_tensors_beside_the_weights(tmp_path, ending, words):
    folder = copied(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.0.self_attn.q_proj.{ending}"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        use(folder)


@pytest.mark.parametrize("content, words", [(POINTER, "Git LFS pointer"), ("\n<!DOCTYPE HTML>", "web page"), ("<html><body>404", "web page")])  # fmt: skip
@pytest.mark.parametrize(
    "name, file",
    [
        ("glm_edge", "config.json"),
        ("glm_edge", "tokenizer.json"),
        ("glm_edge", "model.safetensors"),
        ("glm4", "tokenizer.model"),
        ("glm4", "generation_config.json"),
        ("llava", "chat_template.json"),
        ("llava", "model.safetensors.index.json"),
        ("visualglm", "ice_text.model"),
    ],
)
def test_what_a_download_left_instead_of_a_file(tmp_path, name, file, content, words):
    folder = copied(tmp_path, name)
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file} is .*{words}"):
        use(folder)
        family = family_of(folder)
        family.prompt([{"role": "user", "content": "hi"}], family.languages[0])
        family.sampling(False)


def test_files_of_a_mac_are_nothing(tmp_path):
    folder = copied(tmp_path, "glm_edge_v")
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    use(folder)
