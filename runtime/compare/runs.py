"""The two sides of a comparison: what the reference, the candidate, and rounding alone say about every question.

Questions and options flow in; logits, vision features and the measures of every layer flow out, one model in memory at a
time (with --layer-by-layer one layer of it). The reference answers greedily; its tokens are fed to all sides.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.common import progress
from runtime.common.errors import ToolkitError
from runtime.common.progress import spinner
from runtime.engine.command import open_engine
from runtime.engine.options import EngineOptions, SamplingParams, one_at_a_time

from .cases import Case
from .dataset import answers
from .limits import is_quantised
from .outcomes import Noise, Outcome, Side

if TYPE_CHECKING:  # `--help` does without numpy
    import numpy as np

    from .options import CompareOptions


def run_reference(
    options: CompareOptions, max_model_len: int | None, cases: list[Case], work: Path
) -> Side:
    """Greedy answers in plain torch (or transformers), the logits of every step, and in `work` the streams of every layer."""
    try:
        engine, seconds = load(
            "reference", options.reference, reference_loader(options, max_model_len)
        )
    except ToolkitError as error:  # its sentence names the candidate's flags
        message = (
            str(error).replace("--dtype", "--reference-dtype").replace("--model ", "--reference ")
        )
        raise ToolkitError(f"the reference cannot be loaded: {message}", error.exit_code) from error
    prompts, features = encode(engine, cases)
    from .layerwise import record

    outcomes = []
    for prompt, rows in progress.track(
        "reference: questions", list(zip(prompts, features)), options.layer_by_layer
    ):
        tokens, answer = fed_tokens(engine, prompt, options)
        if options.native or options.reference_dtype != "float32":
            logits = engine.score(prompt, tokens)
            streams = None
        else:
            logits, streams = record(engine, prompt, tokens, work / f"{len(outcomes)}.npy")
        outcomes.append(Outcome(prompt.ids.tolist(), rows, tokens, answer, logits, streams))
    return Side(
        information(engine, options.reference, seconds),
        engine.family,
        outcomes,
        answers=answer_dataset(engine, options),
    )


def fed_tokens(engine, prompt, options: CompareOptions) -> tuple[list[int], str]:
    """The greedy answer's ids and text. With --layer-by-layer, where every new token would read all weights again, the
    prompt's last ids over and over: any tokens will do to compare on."""
    if options.layer_by_layer:
        import numpy as np

        rows = engine.family.vision.rows if prompt.pixels else 0
        start = max((first + rows for first in prompt.layout.image_starts), default=0)
        tokens = np.resize(prompt.ids[start:], options.max_tokens).tolist()
        return tokens, engine.family.tokenizer.decode(tokens)
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=options.max_tokens)
    result = engine.generate([prompt], greedy)[0]
    # a stopped answer also has a step that predicted the stop; the id itself is never fed
    return result.token_ids + list(
        engine.family.stop_ids[:1] if result.finish_reason == "stop" else ()
    ), result.text


def run_candidate(
    options: CompareOptions, engine_options: EngineOptions, cases: list[Case], reference: Side
) -> Side:
    """The reference's tokens, fed to the candidate step by step; then every layer on the reference's streams."""
    given = replace(one_at_a_time(engine_options), layer_by_layer=options.layer_by_layer)
    engine, seconds = load("candidate", options.model, partial(open_engine, options=given))
    prompts, features = encode(engine, cases)
    outcomes = []
    note = why_no_layers(options, engine_options)
    for prompt, rows, expected in progress.track(
        "candidate: questions",
        list(zip(prompts, features, reference.outcomes)),
        options.layer_by_layer,
    ):
        check_same_model(engine.family, prompt.ids.tolist(), rows, expected)
        logits = engine.score(prompt, expected.token_ids)
        outcomes.append(
            Outcome(prompt.ids.tolist(), rows, expected.token_ids, expected.answer, logits)
        )
    known = reference.info["sha256"] if Path(options.model).samefile(options.reference) else None
    side = Side(
        information(engine, options.model, seconds, known),
        engine.family,
        outcomes,
        note=note,
        answers=answer_dataset(engine, options),
    )
    if not note:
        side.layers = run_layers(
            "candidate: layers", engine, prompts, reference, options.layer_by_layer
        )
        side.noise = run_noise(options, engine, prompts, reference)
    return side


def answer_dataset(engine, options: CompareOptions) -> list[str]:
    return answers(
        engine, options.questions, options.dataset or "", options.language, options.max_tokens
    )


def why_no_layers(options: CompareOptions, engine_options: EngineOptions) -> str | None:
    if options.reference_dtype != "float32":
        return "layers are compared with a float32 reference; leave --reference-dtype out"
    if options.native:
        return "transformers' own implementation shows features and logits; leave --reference out to compare layers"
    if engine_options.tensor_parallel_size > 1:
        return "a decoder split over several devices shows features and logits; use one device to compare layers"
    return None


def run_layers(role: str, engine, prompts: list, reference: Side, quiet: bool) -> dict[str, dict]:
    from .layerwise import merge, prompt_stages

    pairs = list(zip(prompts, reference.outcomes))
    return merge(
        [
            prompt_stages(engine, prompt, outcome.token_ids, outcome.streams, outcome.logits)
            for prompt, outcome in progress.track(f"{role}: questions", pairs, quiet)
        ]
    )


def run_noise(options: CompareOptions, candidate, prompts: list, reference: Side) -> Noise | None:
    """None in fp32, and for 8 bits, whose limits are fixed."""
    from runtime import Engine

    dtype = str(candidate.plan.dtype).split(".")[1]
    if (
        dtype == "float32"
        or is_quantised(options.model)
        or candidate.options.cpu_weights != "float"
    ):
        return None
    candidate.close()
    gc.collect()
    engine, _ = load(
        "rounding of " + dtype,
        options.reference,
        partial(
            Engine,
            dtype=dtype,
            vision="torch",
            ops="reference",
            max_model_len=candidate.options.max_model_len,
            max_num_seqs=1,
            keep_dtype=candidate.options.keep_dtype,
            layer_by_layer=options.layer_by_layer,
        ),
    )
    logits = [
        engine.score(prompt, outcome.token_ids)
        for prompt, outcome in zip(prompts, reference.outcomes)
    ]
    return Noise(
        run_layers("rounding: layers", engine, prompts, reference, options.layer_by_layer), logits
    )


def reference_loader(options: CompareOptions, max_model_len: int | None):
    """What makes the reference of a checkpoint folder."""
    if options.native:
        from .transformers_engine import TransformersEngine

        return partial(TransformersEngine, dtype=options.reference_dtype)
    from runtime import Engine

    return partial(
        Engine,
        dtype=options.reference_dtype,
        vision="torch",
        ops="reference",
        max_model_len=max_model_len,
        max_num_seqs=1,
        layer_by_layer=options.layer_by_layer,
    )


def load(role: str, model: str, make):
    """(engine, seconds it took)."""
    progress.print_status(f"{role}: loading {model}")
    start = time.perf_counter()
    return make(model), time.perf_counter() - start


def encode(engine, cases: list[Case]):
    """Prompts and vision features of all cases; the first picture may convert the vision encoder and then says so."""
    prompts = [engine.prompt(case.messages, language=case.language) for case in cases]
    return prompts, [engine.features(prompt) for prompt in prompts]


def check_same_model(family, ids: list[int], features: np.ndarray, expected: Outcome):
    vocabulary = expected.logits.shape[1]
    if (
        ids != expected.ids
        or family.decoder.vocab_size != vocabulary
        or features.shape != expected.features.shape
    ):
        raise ToolkitError(
            "reference and candidate do not read the same prompt: "
            f"{len(expected.ids)} and {len(ids)} tokens, vocabulary {vocabulary} and "
            f"{family.decoder.vocab_size}, picture rows {expected.features.shape} and {features.shape}; "
            "give --reference a checkpoint of the same model"
        )


def information(engine, model: str, seconds: float, digest: str | None = None) -> dict:
    """What the report tells about a side; `digest` saves reading the weights again."""
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
    }
