"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes, 1 no.

A checkpoint and a candidate's options flow in; report.json and report.html flow out. The reference (plain torch, fp32)
answers a few questions greedily; its tokens are fed to both sides one by one, and every step's logits are compared, as
are the vision features, and every layer on the reference's own input (layers.py). One side is in memory at a time.
"""
from __future__ import annotations

import gc
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .dataset import answers
from .dataset import read as read_dataset
from .dataset import summary as dataset_summary
from .errors import CHECK_FAILED, ToolkitError, run_command
from .limits import all_limits, is_quantised, read_limit
from .options import (
    EngineOptions,
    InputOptions,
    Parser,
    SamplingParams,
    check_folder,
    check_pictures,
    dtype_name,
    flag,
    one_at_a_time,
    require,
)
from .progress import spinner
from .questions import QUESTIONS, content

if TYPE_CHECKING:       # `--help` does without numpy
    import numpy as np


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
        self.questions = read_dataset(self.dataset) if self.dataset else []
        self.limit = [read_limit(text) for text in self.limit]


@dataclass
class Case:
    """One question and its pictures (path or PIL image); language None = the family's default wording."""
    question: str
    language: str | None
    pictures: list

    @property
    def messages(self):
        return [{"role": "user", "content": content(self.question, self.pictures)}]


@dataclass
class Outcome:
    """What one side says about one case. features float32 [rows, hidden], logits float32 [len(token_ids), vocab]."""
    ids: list[int]
    features: np.ndarray
    token_ids: list[int]
    answer: str
    logits: np.ndarray
    streams: object = None              # layers.Recorder, of the reference


@dataclass
class Noise:
    """What rounding alone does: the reference in the candidate's dtype, its layers as Side's, its logits of every question."""
    layers: dict
    logits: list[np.ndarray]


@dataclass
class Side:
    """One model's outcomes, its family (for token texts) and what the report tells about it; layers as
    layers.judge takes them, or a note why there are none."""
    info: dict
    family: object
    outcomes: list[Outcome]
    layers: dict | None = None
    noise: Noise | None = None
    note: str | None = None
    answers: list[str] = field(default_factory=list)        # to the data set


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

    from .verdict import judge
    cases = choose_cases(options, family_of(options.model))
    with tempfile.TemporaryDirectory(prefix=".streams-", dir=out) as work:
        reference = run_reference(options, candidate_options.max_model_len, cases, Path(work))
        gc.collect()                            # one model in memory at a time
        candidate = run_candidate(options, candidate_options, cases, reference)
    found = judge(reference, candidate, cases, all_limits(options, candidate_options.cpu_weights != "float"))
    found["dataset"] = dataset_summary(options.dataset, options.questions, reference.answers, candidate.answers) \
        if options.questions else None
    found["culprit"] = find_culprit(options, candidate_options, cases, reference, found) if options.search else None
    return {**found, "options": {"max_tokens": options.max_tokens}}, [case.pictures for case in cases]


def find_culprit(options, candidate_options, cases: list[Case], reference: Side, found: dict) -> dict | None:
    """What culprit.report tells; None where the logits pass or no layers were compared."""
    from . import Engine, culprit
    limits = {c["measure"]: c["limit"] for c in found["checks"] if c["stage"] == "decode"}
    if not found["layers"] or all(c["passed"] for c in found["checks"] if c["stage"] == "decode"):
        return None
    gc.collect()
    engine, _ = load("search: candidate", options.model, partial(Engine, **vars(candidate_options)))
    given = vars(candidate_options) | {"dtype": str(engine.plan.dtype).split(".")[1]}
    floats, _ = load("search: reference", options.reference, partial(Engine, **given))
    prompts, _ = encode(engine, cases)
    with spinner("searching"):
        search = culprit.Search(engine, floats, prompts, reference.outcomes, limits)
        return culprit.report(engine.family, search.run(culprit.ranked(found["layers"])), search.trials)


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


def run_reference(options: CompareOptions, max_model_len: int | None, cases: list[Case], work: Path) -> Side:
    """Greedy answers in plain torch (or transformers), the logits of every step, and in `work` the streams of every layer."""
    try:
        engine, seconds = load("reference", options.reference, reference_loader(options, max_model_len))
    except ToolkitError as error:               # its sentence names the candidate's flags
        message = str(error).replace("--dtype", "--reference-dtype").replace("--model ", "--reference ")
        raise ToolkitError(f"the reference cannot be loaded: {message}", error.exit_code) from error
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=options.max_tokens)
    prompts, features = encode(engine, cases)
    from .layers import record
    outcomes = []
    for prompt, rows in report.track("reference", list(zip(prompts, features))):
        result = engine.generate([prompt], greedy)[0]
        # a stopped answer also has a step that predicted the stop; the id itself is never fed
        tokens = result.token_ids + list(engine.family.stop_ids[:1] if result.finish_reason == "stop" else ())
        if options.native or options.reference_dtype != "float32":
            logits, streams = engine.score(prompt, tokens), None
        else:
            logits, streams = record(engine, prompt, tokens, work / f"{len(outcomes)}.npy")
        outcomes.append(Outcome(prompt.ids.tolist(), rows, tokens, result.text, logits, streams))
    return Side(information(engine, options.reference, seconds), engine.family, outcomes,
                answers=answer_dataset(engine, options))


def run_candidate(options: CompareOptions, engine_options: EngineOptions, cases: list[Case], reference: Side) -> Side:
    """The reference's tokens, fed to the candidate step by step; then every layer on the reference's streams."""
    from . import Engine
    engine, seconds = load("candidate", options.model, partial(Engine, **vars(one_at_a_time(engine_options))))
    prompts, features = encode(engine, cases)
    outcomes, note = [], why_no_layers(options, engine_options)
    for prompt, rows, expected in report.track("candidate", list(zip(prompts, features, reference.outcomes))):
        check_same_model(engine.family, prompt.ids.tolist(), rows, expected)
        logits = engine.score(prompt, expected.token_ids)
        outcomes.append(Outcome(prompt.ids.tolist(), rows, expected.token_ids, expected.answer, logits))
    known = reference.info["sha256"] if Path(options.model).samefile(options.reference) else None
    side = Side(information(engine, options.model, seconds, known), engine.family, outcomes, note=note,
                answers=answer_dataset(engine, options))
    if not note:
        side.layers = run_layers("candidate: layers", engine, prompts, reference)
        side.noise = run_noise(options, engine, prompts, reference)
    return side


def answer_dataset(engine, options: CompareOptions) -> list[str]:
    return answers(engine, options.questions, options.dataset or "", options.language, options.max_tokens)


def why_no_layers(options: CompareOptions, engine_options: EngineOptions) -> str | None:
    if options.reference_dtype != "float32":
        return "layers are compared with a float32 reference; leave --reference-dtype out"
    if options.native:
        return "transformers' own implementation shows features and logits; leave --reference out to compare layers"
    if engine_options.tensor_parallel_size > 1:
        return "a decoder split over several devices shows features and logits; use one device to compare layers"
    return None


def run_layers(role: str, engine, prompts: list, reference: Side) -> dict[str, dict]:
    from .layers import merge, prompt_stages
    pairs = list(zip(prompts, reference.outcomes))
    return merge([prompt_stages(engine, prompt, outcome.token_ids, outcome.streams, outcome.logits)
                  for prompt, outcome in report.track(role, pairs)])


def run_noise(options: CompareOptions, candidate, prompts: list, reference: Side) -> Noise | None:
    """None in fp32, and for 8 bits, whose limits are fixed."""
    from . import Engine
    dtype = str(candidate.plan.dtype).split(".")[1]
    if dtype == "float32" or is_quantised(options.model) or candidate.options.cpu_weights != "float":
        return None
    candidate.close()
    gc.collect()
    engine, _ = load("rounding of " + dtype, options.reference, partial(
        Engine, dtype=dtype, vision="torch", ops="reference", max_model_len=candidate.options.max_model_len))
    logits = [engine.score(prompt, outcome.token_ids) for prompt, outcome in zip(prompts, reference.outcomes)]
    return Noise(run_layers("rounding: layers", engine, prompts, reference), logits)


def reference_loader(options: CompareOptions, max_model_len: int | None):
    """What makes the reference of a checkpoint folder."""
    if options.native:
        from .hf_reference import TransformersEngine
        return partial(TransformersEngine, dtype=options.reference_dtype)
    from . import Engine
    return partial(Engine, dtype=options.reference_dtype, vision="torch", ops="reference", max_model_len=max_model_len,
                   max_num_seqs=1)


def load(role: str, model: str, make):
    """(engine, seconds it took)."""
    report.say(f"{role}: loading {model}")
    start = time.perf_counter()
    return make(model), time.perf_counter() - start


def encode(engine, cases: list[Case]):
    """Prompts and vision features of all cases; the first picture may convert the vision encoder and then says so."""
    prompts = [engine.prompt(case.messages, language=case.language) for case in cases]
    return prompts, [engine.features(prompt) for prompt in prompts]


def check_same_model(family, ids: list[int], features: np.ndarray, expected: Outcome):
    vocabulary = expected.logits.shape[1]
    if ids != expected.ids or family.decoder.vocab_size != vocabulary or features.shape != expected.features.shape:
        raise ToolkitError("reference and candidate do not read the same prompt: "
                           f"{len(expected.ids)} and {len(ids)} tokens, vocabulary {vocabulary} and "
                           f"{family.decoder.vocab_size}, picture rows {expected.features.shape} and {features.shape}; "
                           "give --reference a checkpoint of the same model")


def information(engine, model: str, seconds: float, digest: str | None = None) -> dict:
    """What the report tells about a side; `digest` saves reading the weights again."""
    if digest is None:
        with spinner(f"hashing {model}"):
            digest = engine.checkpoint.digest(engine.checkpoint.names)
    return {"model": str(Path(model).resolve()), "sha256": digest, "family": engine.family.name,
            "stages": engine.describe(), "options": asdict(engine.options), "load_seconds": round(seconds, 2)}


if __name__ == "__main__":
    sys.exit(run_command(main))
