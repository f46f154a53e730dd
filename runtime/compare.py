"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes, 1 no.

A checkpoint and a candidate's options flow in; report.json and report.html flow out. The reference (plain torch, fp32)
answers a few questions greedily; its tokens are fed to both sides one by one, and every step's logits are compared, as
are the vision features. One side is in memory at a time.
"""
import gc
import shlex
import sys
from dataclasses import asdict, dataclass, field

from .errors import CHECK_FAILED, ToolkitError, run_command
from .options import EngineOptions, InputOptions, Parser, SamplingParams, check_folder, dtype_name, flag, require

QUESTIONS = (("zh", "描述这张图片。", "house"), ("en", "What is in this picture?", "shapes"),
             ("zh", "用一句话介绍一下北京。", None), ("en", "Name three kinds of fruit.", None))


@dataclass(kw_only=True)
class CompareOptions(InputOptions):
    out: str = flag("folder that receives report.json and report.html", metavar="DIR")
    reference: str | None = flag("checkpoint of the reference (default: the same as --model)", default=None, metavar="DIR")
    reference_dtype: str = flag("arithmetic of the reference", default="float32", metavar="DTYPE")
    prompt: tuple[str, ...] = flag("question to compare on; may be repeated (default: a small set in Chinese and English, "
                                   "with and without a picture)", default=(), metavar="TEXT", many=True)
    max_tokens: int = flag("tokens compared per question", default=32, kind=int, metavar="N")
    threshold: float = flag("smallest cosine that passes, of every token's logits and every picture row", default=0.9999,
                            kind=float, metavar="C")

    def __post_init__(self):
        super().__post_init__()
        self.reference, self.reference_dtype = self.reference or self.model, dtype_name(self.reference_dtype)
        check_folder("reference", self.reference)
        require(self, "max_tokens", self.max_tokens >= 1, "1 or more is needed, e.g. 32")
        require(self, "threshold", 0 < self.threshold <= 1, "a cosine above 0 and up to 1 is needed, e.g. 0.9999")
        require(self, "prompt", all(p.strip() for p in self.prompt), "the prompt is empty; give it some text")


@dataclass
class Case:
    """One question, with its pictures (PIL images)."""
    question: str
    language: str | None
    pictures: list

    @property
    def messages(self):
        pictures = [{"type": "image", "image": p} for p in self.pictures]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self.question}]}]


@dataclass
class Outcome:
    """What one side says about one case: features float32 [rows, hidden], logits float32 [tokens, vocab]."""
    ids: list[int]
    token_ids: list[int]
    answer: str
    finish_reason: str
    features: object
    logits: object


@dataclass
class Side:
    """One loaded model's outcomes and what the report tells about it."""
    info: dict
    outcomes: list[Outcome] = field(default_factory=list)


def parser() -> Parser:
    return Parser("python -m runtime.compare", "--model DIR --out DIR [--reference DIR] [options]",
                  "Compare a candidate (the model with the options below) with the reference (plain torch, float32): "
                  "logits token by token and vision features. Exit code 0: within the threshold, 1: not.",
                  {"what to compare": CompareOptions, "candidate": EngineOptions})


def main(argv) -> int:
    options, candidate_options = parser().parse(argv)
    from . import report
    out = report.prepare(options.out)
    cases = choose_cases(options)
    reference_options = EngineOptions(dtype=options.reference_dtype, vision="torch", ops="reference",
                                      max_model_len=candidate_options.max_model_len)
    with report.progress() as bar:
        reference = run_side("reference", options.reference, reference_options, cases, options.max_tokens, bar)
        candidate = run_side("candidate", options.model, candidate_options, cases, options.max_tokens, bar, reference)
    found = judge(reference, candidate, cases, options.threshold)
    found["command"] = shlex.join(["python", "-m", "runtime.compare", *argv])
    found["options"] = {"threshold": options.threshold, "max_tokens": options.max_tokens}
    report.write(found, [case.pictures for case in cases], out)
    report.show(found, out)
    return 0 if found["passed"] else CHECK_FAILED


def choose_cases(options: CompareOptions) -> list[Case]:
    """The user's questions and pictures; where one of them is missing, the built-in ones."""
