"""Defines what is measured for each MODEL: configurations, peers that cannot take part and why, targets, checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from convert.__main__ import main as convert
from models import family_of
from models.synthetic.write import write_checkpoint
from runtime.engine.loading.memory import choose_dtype, decoder_bytes
from runtime.parallel.split import Split
from runtime.vision.artifact import ONNX

from .table import Target


@dataclass(frozen=True)
class Entry:
    """One configuration; `name` is its row. extra: (key, value) pairs that only its jobs get."""

    peer: str
    variant: str
    batch: int = 1
    extra: tuple = ()

    @property
    def name(self) -> str:
        name = f"{self.peer} {self.variant}"
        return f"{name}, batch {self.batch}" if self.batch > 1 else name


@dataclass(frozen=True)
class Case:
    """One MODEL of the command.

    release: the model whose shapes are used; changes: of its config, to leave out what is not measured; absent: peer ->
    why it cannot take part; onnx: vision encoders are exported and measured instead of the language model.
    """

    release: str
    entries: tuple[Entry, ...]
    targets: tuple[Target, ...]
    absent: dict
    changes: dict
    onnx: bool = False


LANGUAGE = (
    Entry("transformers", "bfloat16"),
    Entry("llamacpp", "f16"),
    Entry("ours", "bfloat16"),
    Entry("openvino", "int8"),
    Entry("llamacpp", "q8_0"),
    Entry("ours", "int8"),
    Entry("ours", "int8", batch=8),
    Entry("openvino", "int4"),
    Entry("llamacpp", "q4_0"),
    Entry("llamacpp", "q4_k_m"),
    Entry("ours", "int4"),
)
LANGUAGE_TARGETS = (
    Target(
        "decode bf16 vs transformers bf16",
        2.5,
        "token_s",
        "ours bfloat16",
        ("transformers bfloat16",),
    ),
    Target("decode bf16 vs llama.cpp F16", 1.05, "token_s", "ours bfloat16", ("llamacpp f16",)),
    Target(
        "decode int8 vs the faster of OpenVINO int8 and llama.cpp Q8_0",
        1.25,
        "token_s",
        "ours int8",
        ("openvino int8", "llamacpp q8_0"),
    ),
    Target(
        "decode int4 vs the fastest of OpenVINO int4, llama.cpp Q4_0, Q4_K_M",
        1.1,
        "token_s",
        "ours int4",
        ("openvino int4", "llamacpp q4_0", "llamacpp q4_k_m"),
    ),
    Target(
        "time to first token int8 vs OpenVINO int8", 1.3, "first_s", "ours int8", ("openvino int8",)
    ),
    Target("decode bf16, share of the bandwidth roofline", 0.75, "roofline", "ours bfloat16"),
    Target("decode int8, share of the bandwidth roofline", 0.75, "roofline", "ours int8"),
    Target(
        "decode throughput batch 8 vs batch 1, int8",
        5,
        "throughput",
        "ours int8, batch 8",
        ("ours int8",),
    ),
)

F32 = (("precision", "f32"),)
BF16 = (("precision", "bf16"),)
ENCODERS = (
    Entry("onnxruntime", "float32"),
    Entry("openvino", "float32", extra=F32),
    Entry("openvino", "bfloat16", extra=BF16),
    Entry("ours", "eager"),
    Entry("ours", "default"),
    Entry("ours", "bf16"),
    Entry("ours", "int8"),
)
CLIP = (*ENCODERS, Entry("transformers", "float32"), Entry("transformers", "bfloat16"))


def encoder_targets(eager: str) -> tuple[Target, ...]:
    """`eager`: the row that is plain torch in float32."""
    return (
        Target(
            "image encode, int8 vs ORT fp32", 2.5, "encode_s", "ours int8", ("onnxruntime float32",)
        ),
        Target(
            "image encode, fp32 default vs torch eager fp32",
            1.8,
            "encode_s",
            "ours default",
            (eager,),
        ),
        Target("image encode, bf16 vs torch eager fp32", 1.8, "encode_s", "ours bf16", (eager,)),
    )


PROJECTOR = "reads pictures only through a projector file that its own converter makes, which is not on PyPI"

NO_EVA = "has no EVA-ViT-g with VisualGLM's Q-Former; `ours eager` is the plain torch module"
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
NARROW_CLIP = {
    "text_config": {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
    },
    "vision_config": {
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "image_size": 112,
        "num_attention_heads": 4,
    },
}

# The tiny ones show in minutes that every peer works; their figures mean nothing, so they have no targets.
CASES = {
    "glm-edge-1.5b": Case("glm-edge-1.5b-chat", LANGUAGE, LANGUAGE_TARGETS, {}, {}),
    "visualglm-vision": Case(
        "visualglm-6b",
        ENCODERS,
        encoder_targets("ours eager"),
        {"transformers": NO_EVA, "llamacpp": PROJECTOR},
        {"num_layers": 1},
        onnx=True,
    ),
    "llava-7b-vision": Case(
        "llava-1.5-7b",
        CLIP,
        encoder_targets("transformers float32"),
        {"llamacpp": PROJECTOR},
        {"text_config": {"num_hidden_layers": 1}},
        onnx=True,
    ),
    "tiny": Case("glm-edge-1.5b-chat", LANGUAGE, (), {}, NARROW),
    "tiny-vision": Case("llava-1.5-7b", CLIP, (), {"llamacpp": PROJECTOR}, NARROW_CLIP, onnx=True),
}


def prepare(case: Case, work: Path) -> dict:
    """Writes the checkpoint and, for encoders, the ONNX file, each once -> the fields that every job has."""
    checkpoint = work / "checkpoint"
    write_checkpoint(case.release, checkpoint, changes=case.changes)
    job = {"checkpoint": str(checkpoint), "work": str(work)}
    if case.onnx:
        artifact = work / "artifact"
        if status := convert(["--model", str(checkpoint), "--out", str(artifact), "--onnx-only"]):
            raise SystemExit(status)
        job |= {"artifact": str(artifact), "onnx": str(artifact / ONNX)}
    return job


def streamed_bytes(case: Case, work: Path, variant: str) -> int | None:
    """Bytes of our weights that one decoded token reads: all but the embedding, of which it reads one row."""
    if case.onnx:
        return None
    family = family_of(work / "checkpoint")
    d = family.decoder
    dtype = choose_dtype("bfloat16", family)
    kind = "float" if variant == "bfloat16" else variant
    embedding = d.vocab_size * d.hidden * dtype.itemsize
    return decoder_bytes(family, dtype, Split(d), kind) - embedding
