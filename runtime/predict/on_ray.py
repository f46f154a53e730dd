"""`python -m runtime.predict --engine ray`: the batches of a run over the devices of a Ray cluster, or of this machine.

Ray Data sends each batch to one of a pool of actors with an engine of their own, starts actors that died again, and gives the
answers back in the order of the questions. They go to the file of the local run, so that a killed run is continued, with Ray
or without it. A batch whose actor dies every time does not end the run: Ray drops it, and its lines become errors here.
"""

import json
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

from models.errors import UserError
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.engine.command import open_engine

from .asker import Asker, tell

RETRIES = 2  # of a batch whose actor died


def predict(options, engine_options, sampling, questions, answers):
    """Ask what has no answer yet; as predict.predict."""
    from models import family_of

    family_of(options.model)  # a folder that is no checkpoint is told before anything starts
    ray = started()
    try:
        actors, share = divided(ray, engine_options, options.actors)
        batches = [
            questions[i : i + options.batch_size]
            for i in range(answers.count, len(questions), options.batch_size)
        ]
        rows = asked(
            ray,
            batches,
            (options, for_actors(ray, engine_options, actors), sampling),
            actors,
            share,
        )
        for found in with_lost(rows, batches):
            answers.append(found)
            tell(found, answers.count, len(questions))
    except ray.exceptions.RayError as error:
        raise ToolkitError(
            f"Ray ended the run ({str(error).splitlines()[0]}); its logs lie in /tmp/ray/session_latest/logs, "
            "and the same command continues",
            CHECK_FAILED,
        ) from error
    finally:
        ray.shutdown()


def started():
    """Ray, joined to the cluster in RAY_ADDRESS, or begun here for this run, on the loopback interface."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ToolkitError(
            f"--engine ray needs {error.name}; run: pip install 'ascend-vlm[ray]'",
            MISSING_COMPONENT,
        ) from None
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # what it says of lost batches is in its log file, too
            handler.setLevel(logging.CRITICAL)
    address = os.environ.get("RAY_ADDRESS")
    here = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    try:
        ray.init(
            **({"address": address} if address else here),
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except Exception as error:  # of many kinds
        raise ToolkitError(
            f"Ray does not start ({error}); its logs lie in /tmp/ray/session_latest/logs",
            MISSING_COMPONENT,
        ) from error
    return ray


def divided(ray, engine_options, actors: int | None) -> tuple[int, dict]:
    """How many actors (default: one per device; a machine without NPUs is one), and what each asks of Ray."""
    found = ray.cluster_resources()
    size = engine_options.tensor_parallel_size
    if engine_options.device != "cpu":
        room = int(found.get("NPU", 0)) // size
        if not 1 <= (actors or room) <= room:
            raise ToolkitError(
                f"the Ray cluster has {int(found.get('NPU', 0))} NPUs, {(actors or 1) * size} are needed; give "
                "another --actors, or start the nodes with ray start --resources '{\"NPU\": N}'"
            )
        return actors or room, {"num_cpus": 1, "resources": {"NPU": size}}
    cpus = int(found.get("CPU", 1))
    actors = actors or machines(ray)
    if actors > cpus:
        raise ToolkitError(
            f"--actors is {actors}: the Ray cluster has {cpus} CPUs, and each actor needs one"
        )
    return actors, {"num_cpus": cpus // actors}


def machines(ray) -> int:
    return sum(node["Alive"] for node in ray.nodes())


def for_actors(ray, engine_options, actors: int):
    """The engine of one actor: the NPUs Ray gave it are the only ones it sees; on CPUs it shares the memory with others."""
    if engine_options.device != "cpu":
        return replace(engine_options, device="npu:0")
    return replace(
        engine_options,
        memory_utilization=engine_options.memory_utilization / -(-actors // machines(ray)),
    )


def asked(ray, batches, job, actors: int, share: dict):
    """Yields {"number": of the batch, "answers": json, "refused": json}, in order; batches that were lost are missing."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.max_consecutive_actor_init_deaths = RETRIES
    context.print_on_execution_start = False
    # a block each: it is Ray's unit of order, of retries and of loss. Nothing is read by tasks, which would need CPUs.
    items = [
        {"number": number, "questions": pickle.dumps(batch)} for number, batch in enumerate(batches)
    ]
    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            AskBatch,
            batch_size=1,
            fn_constructor_args=job,
            compute=ray.data.ActorPoolStrategy(size=actors),
            max_task_retries=RETRIES,
            **share,
        )
        .iter_rows()
    )


def with_lost(rows, batches):
    """The answers of every batch: errors for those that `rows` has not."""
    expected = 0
    for row in rows:
        if refused := json.loads(row["refused"]):
            raise ToolkitError(*refused)
        yield from map(lost, batches[expected : row["number"]])
        yield json.loads(row["answers"])
        expected = row["number"] + 1
    yield from map(lost, batches[expected:])


def lost(batch: list) -> list[dict]:
    error = ToolkitError(
        f"the process that computed it died or failed, {RETRIES + 1} times; Ray's logs say why"
    )
    return [
        Asker.failed(question, question if isinstance(question, Exception) else error)
        for question in batch
    ]


class AskBatch:
    """An actor: loads an engine once, then answers batches. Why an engine cannot be loaded goes back as an answer, because
    of an actor that fails Ray hands on no more than text."""

    def __init__(self, options, engine_options, sampling):
        self.refused = None
        try:
            engine = open_engine(Path(options.model).resolve(), engine_options)
        except UserError as error:
            self.refused = str(error), error.exit_code
        else:
            self.asker = Asker(
                engine, sampling, options.language, Path(options.input).resolve().parent
            )

    def __call__(self, batch: dict) -> dict:
        answers = [] if self.refused else self.asker.ask(pickle.loads(batch["questions"][0]))
        return {
            "number": batch["number"],
            "answers": [json.dumps(answers)],
            "refused": [json.dumps(self.refused)],
        }
