"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes, 1 no.

A checkpoint and a candidate's options flow in; report.json and report.html flow out. The reference (plain torch, fp32)
answers a few questions greedily; its tokens are fed to both sides one by one, and every step's logits are compared, as
are the vision features. One side is in memory at a time.
"""
from __future__ import annotations

import gc
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .errors import CHECK_FAILED, ToolkitError, run_command
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
from .questions import QUESTIONS

if TYPE_CHECKING:       # `--help` does without numpy
    import numpy as np

EXACT, QUANTISED = 0.9999, 0.99     # smallest cosine, unless --threshold says otherwise
STAGES = {"vision": "vision features", "decode": "decoder logits"}


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
                                   "0.9999; 0.99 for the logits of a quantised --model against a float --reference)",
                                   default=None, kind=float, metavar="C")

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


@dataclass
class Case:
    """One question and its pictures (path or PIL image); language None = the family's default wording."""
    question: str
    language: str | None
    pictures: list

    @property
    def messages(self):
        pictures = [{"type": "image", "image": p} for p in self.pictures]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self.question}]}]


@dataclass
class Outcome:
    """What one side says about one case. features float32 [rows, hidden], logits float32 [len(token_ids), vocab]."""
    ids: list[int]
    features: np.ndarray
    token_ids: list[int]
    answer: str
    logits: np.ndarray


@dataclass
class Side:
    """One model's outcomes, its family (for token texts) and what the report tells about it."""
    info: dict
    family: object
    outcomes: list[Outcome]


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
    cases = choose_cases(options, family)
    reference = run_reference(options, candidate_options.max_model_len, cases)
    gc.collect()                                # one model in memory at a time
    candidate = run_candidate(options, candidate_options, cases, reference)
    limits = thresholds(options)
    found = judge(reference, candidate, cases, limits)
    found |= {"command": shlex.join(["python", "-m", "runtime.compare", *argv]), "environment": report.environment(),
              "options": {"threshold": limits["decode"], "max_tokens": options.max_tokens}}
    report.write(found, [case.pictures for case in cases], out)
    report.show(found, out)
    return 0 if found["passed"] else CHECK_FAILED


def thresholds(options: CompareOptions) -> dict[str, float]:
    """Limit of every stage. Rounding to 8 bits moves logits by more than any kernel does; what it may cost is judged by
    `python -m quant`, here a broken scale shows."""
    from models.quantized import find_description
    rounded = find_description(options.model) and (options.native or not find_description(options.reference))
    return {stage: options.threshold or (QUANTISED if rounded and stage == "decode" else EXACT) for stage in STAGES}


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


def run_reference(options: CompareOptions, max_model_len: int | None, cases: list[Case]) -> Side:
    """Greedy answers in plain torch (or transformers), and the logits of every step."""
    try:
        engine, seconds = load("reference", options.reference, reference_loader(options, max_model_len))
    except ToolkitError as error:               # its sentence names the candidate's flags
        message = str(error).replace("--dtype", "--reference-dtype").replace("--model ", "--reference ")
        raise ToolkitError(f"the reference cannot be loaded: {message}", error.exit_code) from error
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=options.max_tokens)
    prompts, features = encode(engine, cases)
    outcomes = []
    for prompt, rows in report.track("reference", list(zip(prompts, features))):
        result = engine.generate([prompt], greedy)[0]
        # a stopped answer also has a step that predicted the stop; the id itself is never fed
        tokens = result.token_ids + list(engine.family.stop_ids[:1] if result.finish_reason == "stop" else ())
        outcomes.append(Outcome(prompt.ids.tolist(), rows, tokens, result.text, engine.score(prompt, tokens)))
    return Side(information(engine, options.reference, seconds), engine.family, outcomes)


def run_candidate(options: CompareOptions, engine_options: EngineOptions, cases: list[Case], reference: Side) -> Side:
    """The reference's tokens, fed to the candidate step by step."""
    from . import Engine
    engine, seconds = load("candidate", options.model, partial(Engine, **vars(one_at_a_time(engine_options))))
    prompts, features = encode(engine, cases)
    outcomes = []
    for prompt, rows, expected in report.track("candidate", list(zip(prompts, features, reference.outcomes))):
        check_same_model(engine.family, prompt.ids.tolist(), rows, expected)
        logits = engine.score(prompt, expected.token_ids)
        outcomes.append(Outcome(prompt.ids.tolist(), rows, expected.token_ids, expected.answer, logits))
    known = reference.info["sha256"] if Path(options.model).samefile(options.reference) else None
    return Side(information(engine, options.model, seconds, known), engine.family, outcomes)


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


def judge(reference: Side, candidate: Side, cases: list[Case], limits: dict[str, float]) -> dict:
    """The report: summary per stage, the checks that decide, every case and token. Layout: docs of report.SCHEMA."""
    from . import metrics
    pairs = list(zip(reference.outcomes, candidate.outcomes))
    vision = [metrics.compare_rows(a.features, b.features) for a, b in pairs]
    decode = [metrics.compare_logits(a.logits, b.logits) for a, b in pairs]
    stages = {"vision": metrics.summarize(vision), "decode": metrics.summarize(decode)}
    checks = [check(name, stage, limits[name]) for name, stage in stages.items() if stage["rows"]]
    passed = bool(stages["decode"]["rows"]) and all(c["passed"] for c in checks)
    return {"schema": report.SCHEMA, "passed": passed, "verdict": verdict(passed, checks), "checks": checks,
            "stages": stages, "reference": reference.info, "candidate": candidate.info,
            "cases": [describe_case(*four, candidate.family)
                      for four in zip(cases, reference.outcomes, vision, decode)]}


def check(name: str, stage: dict, threshold: float) -> dict:
    """NaN is never within a threshold."""
    value = stage["cosine_min"]
    return {"stage": name, "measure": "cosine_min", "value": value, "limit": threshold, "passed": value >= threshold,
            "nonfinite": stage["nonfinite"], "worst": stage["worst"]}


def verdict(passed: bool, checks: list[dict]) -> str:
    """One sentence: the smallest cosine of every stage, or what failed where."""
    if not checks:
        return "FAILED: nothing was compared"
    if passed:
        smallest = ", ".join(f"{STAGES[c['stage']]} {report.cosine(c['value'])}" for c in checks)
        limits = " or ".join(dict.fromkeys(f"{c['limit']:g}" for c in checks))
        return f"PASSED: no cosine is below {limits}; smallest: {smallest}"
    return "FAILED: " + "; ".join(failure(c) for c in checks if not c["passed"])


def failure(c: dict) -> str:
    what, row, question = STAGES[c["stage"]], c["worst"]["row"] + 1, c["worst"]["case"] + 1
    place = f"{'token' if c['stage'] == 'decode' else 'row'} {row} of question {question}"
    if c["nonfinite"]:
        return f"{c['nonfinite']:,} values of the {what} are NaN or Inf, the first at {place}"
    return f"the cosine of the {what} falls to {report.cosine(c['value'])} at {place}, below {c['limit']:g}"


def describe_case(case: Case, expected: Outcome, vision: dict, decode: dict, family) -> dict:
    from . import metrics
    agree = decode["agree"].tolist()
    return {"question": case.question, "language": case.language, "pictures": len(case.pictures),
            "prompt_tokens": len(expected.ids), "answer": expected.answer, "same_answer": all(agree),
            "vision": metrics.summarize([vision]), "decode": metrics.summarize([decode]),
            "tokens": [describe_token(decode, row, family) for row in range(len(agree))]}


def describe_token(decode: dict, row: int, family) -> dict:
    token = {name: decode[name][row].item() for name in decode}
    return {"text": token_text(family, token["reference_top1"]),
            "candidate_text": token_text(family, token["candidate_top1"]), **token}


def token_text(family, token_id: int) -> str:
    return "<stop>" if token_id in family.stop_ids else family.tokenizer.decode([token_id])


if __name__ == "__main__":
    sys.exit(run_command(main))
