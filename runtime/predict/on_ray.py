"""`python -m runtime.predict --engine ray`: answers batches on the devices of a Ray cluster, or of
this machine.

Takes the batches of a run, returns their output lines in order. Ray Data sends each batch to one of
a pool of actors, each with an engine of its own, and replaces actors that died. The lines go to the
same file as those of a local run, so that a killed run is continued with Ray or without it. A batch
whose actor dies every time does not end the run: Ray drops it, and its lines become errors here.
"""

import json
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

from models import family_of
from models.errors import UserError
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.engine.command import open_engine

from .predictor import failed_line, predictor_of

RETRIES = 2  # of a batch whose actor died


def answer_batches(options, engine_options, sampling, batches: list[list]):
    """Yields the output lines of one batch after another. ToolkitError if Ray ends the run."""
    family_of(options.model)  # a folder that is no checkpoint is refused before anything starts
    ray = start_ray()
    try:
        count, resources = plan_actors(ray, engine_options, options.actors)
        arguments = (options, actor_engine_options(ray, engine_options, count), sampling)
        rows = run_batches(ray, batches, arguments, count, resources)
        yield from fill_lost_batches(rows, batches)
    except ray.exceptions.RayError as error:
        raise ToolkitError(
            f"Ray ended the run ({str(error).splitlines()[0]}); its logs lie in "
            "/tmp/ray/session_latest/logs, and the same command continues",
            CHECK_FAILED,
        ) from error
    finally:
        ray.shutdown()


def start_ray():
    """The module `ray`, joined to the cluster in RAY_ADDRESS, or to one of this run alone on the
    loopback interface. ToolkitError if it is not installed or does not start."""
    ray = import_ray()
    cluster = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    if os.environ.get("RAY_ADDRESS"):
        cluster = {"address": os.environ["RAY_ADDRESS"]}
    try:
        ray.init(**cluster, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of many kinds
        raise ToolkitError(
            f"Ray does not start ({error}); its logs lie in /tmp/ray/session_latest/logs",
            MISSING_COMPONENT,
        ) from error
    return ray


def import_ray():
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
    return ray


def plan_actors(ray, engine_options, wanted: int | None) -> tuple[int, dict]:
    """(number of actors, what each one asks of Ray). ToolkitError for more than the cluster has.

    Without `wanted`: one actor per device; a machine without NPUs is one device.
    """
    cluster = ray.cluster_resources()
    if engine_options.device != "cpu":
        return plan_npu_actors(int(cluster.get("NPU", 0)), engine_options, wanted)
    cpus = int(cluster.get("CPU", 1))
    actors = wanted or count_machines(ray)
    if actors > cpus:
        raise ToolkitError(
            f"--actors is {actors}: the Ray cluster has {cpus} CPUs, and each actor needs one"
        )
    return actors, {"num_cpus": cpus // actors}


def plan_npu_actors(npus: int, engine_options, wanted: int | None) -> tuple[int, dict]:
    size = engine_options.tensor_parallel_size
    most = npus // size
    actors = wanted or most
    if not 1 <= actors <= most:
        raise ToolkitError(
            f"the Ray cluster has {npus} NPUs, {(wanted or 1) * size} are needed; give another "
            "--actors, or start the nodes with ray start --resources '{\"NPU\": N}'"
        )
    return actors, {"num_cpus": 1, "resources": {"NPU": size}}


def count_machines(ray) -> int:
    return sum(node["Alive"] for node in ray.nodes())


def actor_engine_options(ray, engine_options, actors: int):
    """Engine options of one actor: it sees only the NPUs that Ray gave it; on a CPU it shares the
    memory with the other actors of its machine."""
    if engine_options.device != "cpu":
        return replace(engine_options, device="npu:0")
    actors_per_machine = -(-actors // count_machines(ray))
    share = engine_options.memory_utilization / actors_per_machine
    return replace(engine_options, memory_utilization=share)


def run_batches(ray, batches: list[list], arguments: tuple, actors: int, resources: dict):
    """Yields {"number": of the batch, "lines": json, "refused": json}, in order; lost batches are
    missing. arguments: of BatchActor."""
    set_execution_options(ray.data.DataContext.get_current())
    items = []
    for number, batch in enumerate(batches):
        items.append({"number": number, "questions": pickle.dumps(batch)})
    # One block per batch: a block is Ray's unit of order, of retries and of loss. Nothing is read
    # by tasks, which would need CPUs.
    blocks = ray.data.from_items(items, override_num_blocks=len(items))
    answered = blocks.map_batches(
        BatchActor,
        batch_size=1,
        fn_constructor_args=arguments,
        # one at a time: a batch queued behind one that kills its actor would be lost with it
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        max_task_retries=RETRIES,
        **resources,
    )
    return answered.iter_rows()


def set_execution_options(context):
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # lost batches do not end the run
    context.max_consecutive_actor_init_deaths = RETRIES
    context.print_on_execution_start = False


def fill_lost_batches(rows, batches: list[list]):
    """Yields the lines of every batch, with errors for batches that `rows` lacks. ToolkitError if
    an actor could not load its engine."""
    expected = 0
    for row in rows:
        refused = json.loads(row["refused"])
        if refused:
            raise ToolkitError(*refused)
        yield from map(lost_lines, batches[expected : row["number"]])
        yield json.loads(row["lines"])
        expected = row["number"] + 1
    yield from map(lost_lines, batches[expected:])


def lost_lines(batch: list) -> list[dict]:
    lost = ToolkitError(
        f"the process that computed it died or failed, {RETRIES + 1} times; Ray's logs say why"
    )
    lines = []
    for question in batch:
        error = question if isinstance(question, Exception) else lost
        lines.append(failed_line(question, error))
    return lines


class BatchActor:
    """A process that loads an engine once, then answers batches.

    Why an engine cannot be loaded is returned like an answer, because Ray hands on no more than
    text of an actor that fails.
    """

    def __init__(self, options, engine_options, sampling):
        self.refused = None
        try:
            engine = open_engine(Path(options.model).resolve(), engine_options)
        except UserError as error:
            self.refused = str(error), error.exit_code
        else:
            self.predictor = predictor_of(options, engine, sampling)

    def __call__(self, batch: dict) -> dict:
        questions = pickle.loads(batch["questions"][0])
        lines = [] if self.refused else self.predictor.answer(questions)
        return {
            "number": batch["number"],
            "lines": [json.dumps(lines)],
            "refused": [json.dumps(self.refused)],
        }
