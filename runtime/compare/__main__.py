"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes, 1 no.

A checkpoint and a candidate's options flow in; report.json and report.html flow out. The reference (plain torch, fp32)
answers a few questions greedily; its tokens are fed to both sides one by one, and every step's logits are compared, as
are the vision features, and every layer on the reference's own input (sides.py, layers.py). What fails is looked into:
the first vision module (inside.py), the layers that must be kept in a wider form (culprit.py).
"""
from __future__ import annotations

import gc
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.common.flags import EngineOptions, InputOptions, Parser, check_folder, check_pictures, dtype_name, flag, require
from runtime.common.sample_questions import QUESTIONS

from . import report
from .dataset import read as read_dataset
from .dataset import summary as dataset_summary
from .limits import all_limits, read_limit
from .runs import Case, run_candidate, run_reference


@dataclass(kw_only=True)
class CompareOptions(InputOptions):
    out: str = flag("folder that receives report.json and report.html", metavar="DIR")
    reference: str | None = flag("checkpoint of the reference (default: the same as --model), or `transformers`: "
                                 "its own implementation of the model, where it has one", default=None, metavar="DIR")
    reference_dtype: str = flag("arithmetic of the reference", default="float32", metavar="DTYPE")
    prompt: tuple[str, ...] = flag("question to compare on; may be repeated (default: a small set in Chinese and "
                                   "English, with and without a picture)", default=(), metavar="TEXT", many=True)
    max_tokens: int = flag("tokens compared per question", default=32, kind=int, metavar="N")
    threshold: float | None = flag("smallest cosine that passes, of every token's logits and every picture row (default: "
                                   "0.9999; for the logits less where the dtype's rounding alone costs more, and 0.99 for a "
                                   "quantised --model against a float --reference)",
                                   default=None, kind=float, metavar="C")
    limit: tuple[str, ...] = flag("another limit, e.g. vision.relative_euclidean=0.05, decode.kl_max=0.005 or "
                                  "layers.relative=0.01 (a layer's error, of what it adds); may be repeated", default=(),
                                  metavar="STAGE.MEASURE=X", many=True)
    dataset: str | None = flag("questions with answers, as of runtime.predict with `answer` and perhaps `choices`: both "
                               "sides' share of right ones", default=None, metavar="FILE.jsonl")
    search: bool = flag("if the logits fail: put the decoder's layers back to the reference's weights until they pass, and "
                        "name the smallest set found (loads both models)", default=False, kind=bool)

    layer_by_layer: bool = flag("one layer of the weights in memory at a time, for models larger than it; both sides are fed "
                                "the question's own tokens in place of an answer", default=False, kind=bool)

    def __post_init__(self):
        super().__post_init__()
        self.native = self.reference == "transformers"
        self.reference = self.model if self.native else self.reference or self.model
        self.reference_dtype = dtype_name(self.reference_dtype)
        check_folder("reference", self.reference)
        require(self, "max_tokens", self.max_tokens >= 1, "1 or more is needed, e.g. 32")
        require(self, "threshold", self.threshold is None or 0 < self.threshold <= 1,
                "a cosine above 0 and up to 1 is needed, e.g. 0.9999")
        require(self, "prompt", all(p.strip() for p in self.prompt), "the prompt is empty; give it some text")
        require(self, "search", not (self.search and self.native), "it needs a reference checkpoint; leave --reference out")
        require(self, "layer_by_layer", not self.layer_by_layer or not (self.native or self.search or self.dataset),
                "leave out --search, --dataset and --reference transformers, which need a whole model")
        self.questions = read_dataset(self.dataset) if self.dataset else []
        self.limit = [read_limit(text) for text in self.limit]


def parser() -> Parser:
    return Parser("python -m runtime.compare", "--model DIR --out DIR [--reference DIR] [options]",
                  "Compare a candidate (the model, run with the options below) with the reference (plain torch, "
                  "float32): logits token by token, and vision features. Exit code 0: within the threshold, 1: not.",
                  {"what to compare": CompareOptions, "candidate": EngineOptions})


def main(argv) -> int:
    options, candidate_options = parser().parse(argv)
    from models import family_of
    family = family_of(options.model)
    check_pictures(family, options.image)
    check_same_family(options, family)
    out = report.prepare(options.out)
    found, pictures = findings(options, candidate_options, out)
    found |= {"command": shlex.join(["python", "-m", "runtime.compare", *argv]), "environment": report.environment()}
    report.write(found, pictures, out)
    report.show(found, out)
    return 0 if found["passed"] else CHECK_FAILED


def findings(options: CompareOptions, candidate_options: EngineOptions, out: Path) -> tuple[dict, list[list]]:
    """What the report says, and the pictures of every question; `out` receives work files for the time being."""
    from models import family_of

    from . import float_search as culprit
    from . import vision_nodes as inside
    from .verdict import judge
    cases = choose_cases(options, family_of(options.model))
    with tempfile.TemporaryDirectory(prefix=".streams-", dir=out) as work:
        reference = run_reference(options, candidate_options.max_model_len, cases, Path(work))
        gc.collect()                            # one model in memory at a time
        candidate = run_candidate(options, candidate_options, cases, reference)
    found = judge(reference, candidate, cases, all_limits(options, candidate_options.cpu_weights != "float"))
    found["dataset"] = dataset_summary(options.dataset, options.questions, reference.answers, candidate.answers) \
        if options.questions else None
    found["vision_node"] = None if options.native else inside.find(options, candidate, found, out)
    found["culprit"] = culprit.find(options, candidate_options, cases, reference, found) if options.search else None
    return {**found, "options": {"max_tokens": options.max_tokens}}, [case.pictures for case in cases]


def check_same_family(options: CompareOptions, family):
    """Before anything is loaded: answers of another model would only look like a bad candidate."""
    from models import family_of
    other = family_of(options.reference)
    if other.name != family.name:
        raise ToolkitError(f"--reference {options.reference} is a {other.name} model, --model a {family.name} model; "
                           "give two checkpoints of one model")


def choose_cases(options: CompareOptions, family) -> list[Case]:
    """The user's questions and pictures; the built-in ones where there are none."""
    given = list(options.image)
    if options.prompt:
        return [Case(question, options.language, given) for question in options.prompt]
    chosen = [q for q in QUESTIONS if (q.scene if given else family.vision or not q.scene)]
    return [Case(q.text, options.language or (q.language if q.language in family.languages else None),
                 given or ([q.scene()] if q.scene else [])) for q in chosen]


if __name__ == "__main__":
    sys.exit(run_command(main))
