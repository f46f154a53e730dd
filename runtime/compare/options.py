"""Options of `runtime.compare`: each field is a flag."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.common.devices import device_name
from runtime.common.flags import check_folder, flag, require
from runtime.common.shared_flags import media_path, media_path_flag
from runtime.engine.options import InputOptions, dtype_name

from .dataset import read as read_dataset
from .limits import read_limit


@dataclass(kw_only=True)
class CompareOptions(InputOptions):
    out: str = flag("folder that receives report.json and report.html", metavar="DIR")
    reference: str | None = flag(
        "checkpoint of the reference (default: the same as --model), or `transformers`: "
        "its own implementation of the model, where it has one",
        default=None,
        metavar="DIR",
    )
    reference_dtype: str = flag("arithmetic of the reference", default="float32", metavar="DTYPE")
    reference_device: str = flag(
        "where the reference's decoder runs, in plain torch: cpu, npu:N or cuda:N; a bare number N "
        "is npu:N",
        default="cpu",
        metavar="DEVICE",
    )
    prompt: tuple[str, ...] = flag(
        "question to compare on; may be repeated (default: a small set in Chinese and "
        "English, with and without a picture)",
        default=(),
        metavar="TEXT",
        many=True,
    )
    max_tokens: int = flag("tokens compared per question", default=32, kind=int, metavar="N")
    threshold: float | None = flag(
        "smallest cosine that passes, of every token's logits and every picture row (default: "
        "0.9999; for the logits less where the dtype's rounding alone costs more; a quantised --model "
        "against a float --reference is held to the limits of python -m quant instead: KL 0.05, top-1 0.9)",
        default=None,
        kind=float,
        metavar="C",
    )
    limit: tuple[str, ...] = flag(
        "another limit, e.g. vision.relative_euclidean=0.05, decode.kl_max=0.005 or "
        "layers.relative=0.01 (a layer's error, of what it adds); may be repeated",
        default=(),
        metavar="STAGE.MEASURE=X",
        many=True,
    )
    dataset: str | None = flag(
        "questions with answers, as of runtime.predict with `answer` and perhaps `choices`: both "
        "sides' share of right ones",
        default=None,
        metavar="FILE.jsonl",
    )
    allowed_local_media_path: str | None = media_path_flag()
    search: bool = flag(
        "if the logits fail: put the decoder's layers back to the reference's weights until they pass, and "
        "name the smallest set found (loads both models)",
        default=False,
        kind=bool,
    )

    layer_by_layer: bool = flag(
        "one layer of the weights in memory at a time, for models larger than it; both sides are fed "
        "the question's own tokens in place of an answer",
        default=False,
        kind=bool,
    )

    def __post_init__(self):
        super().__post_init__()
        self.native = self.reference == "transformers"
        if self.native or not self.reference:
            self.reference = self.model
        self.reference_dtype = dtype_name(self.reference_dtype)
        self.reference_device = device_name(self.reference_device, "--reference-device")
        require(
            self,
            "reference_device",
            self.reference_device == "cpu" or not (self.native or self.layer_by_layer),
            "transformers' implementation and --layer-by-layer run on the CPU; leave it out",
        )
        check_folder("reference", self.reference)
        require(self, "max_tokens", self.max_tokens >= 1, "1 or more is needed, e.g. 32")
        require(
            self,
            "threshold",
            self.threshold is None or 0 < self.threshold <= 1,
            "a cosine above 0 and up to 1 is needed, e.g. 0.9999",
        )
        require(
            self,
            "prompt",
            all(p.strip() for p in self.prompt),
            "the prompt is empty; give it some text",
        )
        require(
            self,
            "search",
            not (self.search and self.native),
            "it needs a reference checkpoint; leave --reference out",
        )
        require(
            self,
            "layer_by_layer",
            not self.layer_by_layer or not (self.native or self.search or self.dataset),
            "leave out --search, --dataset and --reference transformers, which need a whole model",
        )
        self.questions = []
        if self.dataset:
            self.questions = read_dataset(self.dataset, media_path(self))
        self.limit = [read_limit(text) for text in self.limit]
