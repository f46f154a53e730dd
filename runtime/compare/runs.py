"""The two sides of a comparison.

Takes questions and options, returns what the reference, the candidate, and rounding alone compute
for every question: logits, vision features and the measures of every layer; one model in memory at
a time (with --layer-by-layer one layer of it). The reference answers greedily; its tokens are fed
to all sides.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from models.checkpoint.quantized import find_description
from models.family import Family, Prompt
from runtime.common.errors import ToolkitError
from runtime.common.progress import print_status, spinner, track
from runtime.common.shared_flags import media_path
from runtime.compare.layers.layerwise import compare_stages, merge, record
from runtime.engine.command import open_engine
from runtime.engine.options import EngineOptions, SamplingParams, one_at_a_time

from .cases import Case
from .dataset_answers import answers
from .options import CompareOptions
from .outcomes import Noise, Outcome, Side
from .transformers_engine import TransformersEngine


def run_reference(
    options: CompareOptions, max_model_len: int | None, cases: list[Case], work: Path
) -> Side:
    """Greedy answers in plain torch (or transformers), the logits of every step, and in `work` the
    streams of every layer."""
    engine, seconds = _load_reference(options, max_model_len)
    prompts, features = encode(engine, cases)
    questions = list(zip(prompts, features))
    outcomes = []
    for prompt, rows in track("reference: questions", questions, options.layer_by_layer):
        tokens, answer = _fed_tokens(engine, prompt, options)
        streams = None
        if options.native or options.reference_dtype != "float32":
            logits = engine.score(prompt, tokens)
        else:
            logits, streams = record(engine, prompt, tokens, work / f"{len(outcomes)}.npy")
        outcomes.append(Outcome(prompt.ids.tolist(), rows, tokens, answer, logits, streams))
    return Side(
        _information(engine, options.reference, seconds),
        engine.family,
        outcomes,
        answers=_answer_dataset(engine, options),
    )


def _load_reference(options: CompareOptions, max_model_len: int | None) -> tuple:
    """(engine, seconds it took); an error's sentence names the reference's flags instead of the
    candidate's."""
    try:
        if options.native:
            make = partial(TransformersEngine, dtype=options.reference_dtype)
        else:
            make = partial(
                open_engine,
                options=EngineOptions(
                    device=options.reference_device,
                    dtype=options.reference_dtype,
                    vision="torch",
                    ops="reference",
                    max_model_len=max_model_len,
                    max_num_seqs=1,
                    layer_by_layer=options.layer_by_layer,
                ),
            )
        return load("reference", options.reference, make)
    except ToolkitError as error:
        message = str(error).replace("--dtype", "--reference-dtype")
        message = message.replace("--device", "--reference-device")
        message = message.replace("--model ", "--reference ")
        raise ToolkitError(f"the reference cannot be loaded: {message}", error.exit_code) from error


def _fed_tokens(engine, prompt: Prompt, options: CompareOptions) -> tuple[list[int], str]:
    """The greedy answer's ids and text. With --layer-by-layer, where every new token would read all
    weights again, the prompt's last ids over and over: any tokens will do to compare on."""
    family = engine.family
    if options.layer_by_layer:
        start = max((rows.stop for rows in family.image_rows(prompt)), default=0)
        tokens = np.resize(prompt.ids[start:], options.max_tokens).tolist()
        return tokens, family.tokenizer.decode(tokens)
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=options.max_tokens)
    result = engine.generate([prompt], greedy)[0]
    tokens = list(result.token_ids)
    if result.finish_reason == "stop":
        tokens += family.stop_ids[
            :1
        ]  # the step that predicted it counts; the id itself is never fed
    return tokens, result.text


def run_candidate(
    options: CompareOptions, engine_options: EngineOptions, cases: list[Case], reference: Side
) -> Side:
    """The reference's tokens, fed to the candidate step by step; then every layer on the
    reference's streams."""
    given = replace(
        one_at_a_time(engine_options),
        layer_by_layer=options.layer_by_layer,
        judge_om=False,  # a bad one gets a report, no refusal
    )
    engine, seconds = load("candidate", options.model, partial(open_engine, options=given))
    prompts, features = encode(engine, cases)
    questions = list(zip(prompts, features, reference.outcomes))
    outcomes = []
    for question in track("candidate: questions", questions, options.layer_by_layer):
        outcomes.append(_candidate_outcome(engine, *question))
    same_weights = Path(options.model).samefile(options.reference)
    digest = reference.info["sha256"] if same_weights else None
    side = Side(
        _information(engine, options.model, seconds, digest),
        engine.family,
        outcomes,
        note=_why_no_layers(options, engine_options),
        unverified=engine.unverified_encoder(),
        answers=_answer_dataset(engine, options),
    )
    if not side.note:
        quiet = options.layer_by_layer
        side.layers = _run_layers("candidate: layers", engine, prompts, reference, quiet)
        side.noise = _run_noise(options, engine, prompts, reference)
    return side


def _candidate_outcome(engine, prompt: Prompt, features: np.ndarray, expected: Outcome) -> Outcome:
    ids = prompt.ids.tolist()
    _check_same_model(engine.family, ids, features, expected)
    logits = engine.score(prompt, expected.token_ids)
    return Outcome(ids, features, expected.token_ids, expected.answer, logits)


def _why_no_layers(options: CompareOptions, engine_options: EngineOptions) -> str | None:
    if options.reference_dtype != "float32":
        return "layers are compared with a float32 reference; leave --reference-dtype out"
    if options.native:
        return (
            "transformers' own implementation shows features and logits; "
            "leave --reference out to compare layers"
        )
    if engine_options.tensor_parallel_size > 1:
        return (
            "a decoder split over several devices shows features and logits; "
            "use one device to compare layers"
        )
    return None


def _run_layers(
    role: str, engine, prompts: list[Prompt], reference: Side, quiet: bool
) -> dict[str, dict]:
    """Stage -> summary of its measures over all questions."""
    measures = []
    questions = list(zip(prompts, reference.outcomes))
    for prompt, outcome in track(f"{role}: questions", questions, quiet):
        measures.append(
            compare_stages(engine, prompt, outcome.token_ids, outcome.streams, outcome.logits)
        )
    return merge(measures)


def _run_noise(
    options: CompareOptions, candidate, prompts: list[Prompt], reference: Side
) -> Noise | None:
    """None in fp32, and for 8 bits, whose limits are fixed."""
    dtype = dtype_of(candidate)
    packed = candidate.options.cpu_weights != "float"
    if dtype == "float32" or packed or is_quantised(options.model):
        return None
    candidate.close()
    gc.collect()
    noisy = EngineOptions(
        device=options.reference_device,
        dtype=dtype,
        vision="torch",
        ops="reference",
        max_model_len=candidate.options.max_model_len,
        max_num_seqs=1,
        keep_dtype=candidate.options.keep_dtype,
        layer_by_layer=options.layer_by_layer,
    )
    make = partial(open_engine, options=noisy)
    engine, _ = load(f"rounding of {dtype}", options.reference, make)
    logits = []
    for prompt, outcome in zip(prompts, reference.outcomes):
        logits.append(engine.score(prompt, outcome.token_ids))
    quiet = options.layer_by_layer
    return Noise(_run_layers("rounding: layers", engine, prompts, reference, quiet), logits)


def load(role: str, model: str, make: Callable) -> tuple:
    """(engine that `make` opens, seconds it took)."""
    print_status(f"{role}: loading {model}")
    start = time.perf_counter()
    return make(model), time.perf_counter() - start


def encode(engine, cases: list[Case]) -> tuple[list[Prompt], list[np.ndarray]]:
    """(prompts, vision features) of all cases; the first image may convert the vision encoder,
    which then prints that."""
    prompts = [engine.prompt(case.messages, language=case.language) for case in cases]
    return prompts, [engine.features(prompt) for prompt in prompts]


def dtype_of(engine) -> str:
    """Of the decoder: "float32"."""
    return str(engine.plan.dtype).split(".")[1]


def is_quantised(model: str) -> bool:
    """msmodelslim describes what it did beside the weights."""
    return find_description(model) is not None


def _answer_dataset(engine, options: CompareOptions) -> list[str]:
    path = options.dataset or ""
    allowed = media_path(options)
    return answers(engine, options.questions, path, options.language, options.max_tokens, allowed)


def _check_same_model(family: Family, ids: list[int], features: np.ndarray, expected: Outcome):
    vocabulary = expected.logits.shape[1]
    same_prompt = ids == expected.ids and features.shape == expected.features.shape
    if not same_prompt or family.decoder.vocab_size != vocabulary:
        raise ToolkitError(
            "reference and candidate do not read the same prompt: "
            f"{len(expected.ids)} and {len(ids)} tokens, vocabulary {vocabulary} and "
            f"{family.decoder.vocab_size}, "
            f"picture rows {expected.features.shape} and {features.shape}; "
            "give --reference a checkpoint of the same model"
        )


def _information(engine, model: str, seconds: float, digest: str | None = None) -> dict:
    """What the report says about a side; `digest` saves reading the weights again."""
    if digest is None:
        with spinner(f"hashing {model}"):
            digest = engine.checkpoint.digest(engine.checkpoint.names)
    return {
        "model": str(Path(model).resolve()),
        "sha256": digest,
        "family": engine.family.name,
        "stages": engine.describe(),
        "options": asdict(engine.options),
        "load_seconds": round(seconds, 2),
        "picture_process_time": round(engine.vision_seconds, 3),
    }
