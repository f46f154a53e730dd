"""Folders that look like a checkpoint and are none that this toolkit reads: each is named for what it is.

Takes a folder, its config.json or its tensors' names, returns a sentence that says what they are and what to do.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from .errors import ModelError
from .side_fields import shown

TRANSFORMERS = "use the release in the layout of transformers (*.safetensors)"
FLOAT = "use the float release (float16 or bfloat16), and quantise with `python -m quant`"
MERGE = "merge it into its base model first (merge_and_unload, then save_pretrained)"

# files of a folder without config.json (a pattern), what it is, what to do
ADAPTER = "a LoRA adapter or another kind of PEFT, not a whole model"
UNFINISHED = "download that is not finished"
FILES = (
    ("adapter_config.json", ADAPTER, MERGE),
    ("adapter_model.*", ADAPTER, MERGE),
    ("model_index.json", "a diffusers pipeline", "use a GLM or LLaVA-1.5 checkpoint"),
    ("*.gguf", "a GGUF file for llama.cpp", FLOAT),
    ("openvino_*.xml", "an OpenVINO model", FLOAT),
    ("*.mlmodelc", "a Core ML model", FLOAT),
    ("rank*.engine", "a TensorRT-LLM engine", FLOAT),
    (
        "*.om",
        "a model compiled for the NPU",
        "give it as --artifact, and the checkpoint as --model",
    ),
    ("vision.onnx", "an artifact of `python -m convert`", "give it as --artifact"),
    ("*.onnx", "an ONNX model", FLOAT),
    ("mlc-chat-config.json", "a model compiled by MLC", FLOAT),
    ("*.rkllm", "a model compiled for Rockchip", FLOAT),
    ("*.nemo", "a NeMo model", TRANSFORMERS),
    ("tf_model*.h5", "TensorFlow weights", TRANSFORMERS),
    ("flax_model*.msgpack", "Flax weights", TRANSFORMERS),
    ("*.ckpt*", "a checkpoint of MindSpore, TensorFlow or Lightning", TRANSFORMERS),
    ("*.distcp", "a checkpoint of FSDP in training", "save it with save_pretrained first"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed in training", "run its zero_to_fp32.py first"),
    ("*.incomplete", f"a {UNFINISHED}", "download it to the end"),
    ("*.crdownload", f"a {UNFINISHED}", "download it to the end"),
    ("*.part", f"a {UNFINISHED}", "download it to the end"),
    ("*.tar*", "an archive", "unpack it, and give the folder with config.json as --model"),
    ("*.tgz", "an archive", "unpack it, and give the folder with config.json as --model"),
    ("*.zip", "an archive", "unpack it, and give the folder with config.json as --model"),
)
# folders in a folder without config.json, which may be meant instead
INNER = (
    "*/config.json",
    "*/model_config.json",
    "*/snapshots/*/config.json",
    "*/adapter_config.json",
)
# pattern of a tensor's name, what has such tensors, what to do
TENSORS = (
    (r".*\.lora_([AB]\b|embedding_|magnitude_).*", "a LoRA that is not merged", MERGE),
    (r".*\.matrix_[AB]\.\d+", "a LoRA of SAT that is not merged", "merge it with SAT first"),
    (
        r".*\.(base_layer|modules_to_save)\..*",
        "an adapter of PEFT that is not merged",
        MERGE,
    ),
    (r".*\.(qweight|qzeros|g_idx)", "weights quantised by GPTQ or AWQ", FLOAT),
    (
        r".*\.weight\.(absmax|quant_map|quant_state\..*)|.*\.(SCB|weight_format)",
        "weights quantised by bitsandbytes",
        FLOAT,
    ),
    (r".*\.W_q", "weights quantised by HQQ", FLOAT),
    (r".*\.(weight_packed|weight_zero_point)", "weights quantised by compressed-tensors", FLOAT),
    (r".*(_scale_inv|weight_scale|input_scale)", "weights quantised to FP8 or int8", FLOAT),
    (r".*\.(scales|biases)", "weights quantised by MLX", FLOAT),
)


def refuse_other_folder(directory: Path):
    """ModelError if the folder is another kind of thing than a checkpoint, by its files."""
    snapshots = directory / "snapshots"
    if snapshots.is_dir():
        found = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
        example = snapshots / (found[0] if found else "<hash>")
        raise ModelError(
            f"{directory} is a folder of the hub's cache; use --model {shlex.quote(str(example))}"
        )
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds {ADAPTER} (adapter_config.json); {MERGE}")
    if any((directory / name).exists() for name in ("config.json", "model_config.json")):
        return
    refuse_other_files(directory)
    for pattern in INNER:
        for file in sorted(directory.glob(pattern)):
            raise ModelError(
                f"{directory} holds no model itself, but folders; use --model "
                f"{shlex.quote(str(file.parent))}"
            )
    if directory.name == "blobs" and (directory.parent / "snapshots").is_dir():
        refuse_other_folder(directory.parent)


def refuse_other_files(directory: Path):
    """ModelError if a file of the folder tells what it holds instead of weights."""
    for pattern, what, advice in FILES:
        for file in directory.glob(pattern):
            if not file.name.startswith("."):
                raise ModelError(f"{directory} holds {what} ({file.name}); {advice}")


def refuse_quantised(directory: Path, config: dict):
    """ModelError if config.json says that another tool quantised the weights."""
    if any(directory.glob("quant_model_description*.json")):
        return
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") or "another tool"
        raise ModelError(
            f"{directory} holds weights quantised by {shown(method)} (quantization_config of "
            f"config.json); {FLOAT}"
        )
    if config.get("quantization_bit"):
        raise ModelError(
            f"{directory} holds weights quantised by ChatGLM's own code (quantization_bit "
            f"{shown(config['quantization_bit'])} of config.json); {FLOAT}"
        )
    if isinstance(config.get("quantization"), dict):
        raise ModelError(
            f"{directory} holds weights quantised by MLX (quantization of config.json); {FLOAT}"
        )


def refuse_other_tensors(directory: Path, names: Iterable[str]):
    """ModelError if names that the model has not tell what the weights are."""
    names = list(names)
    for pattern, what, advice in TENSORS:
        for name in names:
            if re.fullmatch(pattern, name):
                raise ModelError(f"{directory} holds {what} ({shown(name)}); {advice}")
