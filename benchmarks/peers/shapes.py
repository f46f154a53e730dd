"""What is measured per MODEL: variants of peers, those that cannot take part and why, targets, and the checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from .table import Target


@dataclass(frozen=True)
class Entry:
    """One configuration; `name` is its row. extra: what only this job is told."""

    peer: str
    variant: str
    batch: int = 1
    extra: tuple = ()

    @property
    def name(self) -> str:
        return f"{self.peer} {self.variant}" + (f", batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Case:
    """release: whose shapes. changes: of its config, to leave out what is not measured. onnx: encoders are exported."""

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

CASES = {  # the tiny ones show in minutes that every peer works; their figures mean nothing, so they have no targets
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
    """Write the checkpoint and, for encoders, the ONNX, each once -> what every job is told."""
    from models.synthetic.write import write_checkpoint

    checkpoint = work / "checkpoint"
    write_checkpoint(case.release, checkpoint, changes=case.changes)
    told = {"checkpoint": str(checkpoint), "work": str(work)}
    if case.onnx:
        from convert.__main__ import main as convert
        from runtime.vision.artifact import ONNX

        artifact = work / "artifact"
        if status := convert(["--model", str(checkpoint), "--out", str(artifact), "--onnx-only"]):
            raise SystemExit(status)
        told |= {"artifact": str(artifact), "onnx": str(artifact / ONNX)}
    return told


def streamed_bytes(case: Case, work: Path, variant: str) -> int | None:
    """Weights of ours that one decoded token reads: all but the embedding, of which it reads one row."""
    from models import family_of
    from runtime.engine.loading.memory import choose_dtype, decoder_bytes
    from runtime.parallel.split import Split

    if case.onnx:
        return None
    family = family_of(work / "checkpoint")
    d = family.decoder
    dtype = choose_dtype("bfloat16", family)
    kind = "float" if variant == "bfloat16" else variant
    return decoder_bytes(family, dtype, Split(d), kind) - d.vocab_size * d.hidden * dtype.itemsize
