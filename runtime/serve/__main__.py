"""`python -m runtime.serve`: one model behind OpenAI's HTTP API, for many clients at once.

Takes options, serves until a signal ends it. By default it listens on 127.0.0.1, fetches nothing,
reads no file and logs no prompt; see docs/serving.md.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from models import family_of
from runtime.common.allocator import return_freed_memory_regularly
from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command
from runtime.common.flags import Parser
from runtime.common.progress import print_status
from runtime.engine.command import join_torchrun, open_engine
from runtime.engine.options import EngineOptions
from runtime.serve.transport.listen import BACKLOG, open_listeners, possible_connections, url_of

from .options import LOCAL, ServeOptions

HEADER_BYTES = 65536


def main(argv) -> int:
    options, engine_options = Parser(
        "python -m runtime.serve",
        "--model DIR [--port N] [options]",
        "Serves a model to many clients at once through OpenAI's HTTP API: /v1/chat/completions, "
        "/v1/completions, /v1/models, and /tokenize, /detokenize, /health, /version, /metrics.",
        {"service": ServeOptions, "model": EngineOptions},
    ).parse(argv)
    join_torchrun(engine_options)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ToolkitError(
            f"the service needs {error.name}; run: pip install 'ascend-vlm[serve]'",
            MISSING_COMPONENT,
        ) from None
    if options.host not in LOCAL and not options.api_key:
        print_status(
            f"warning: anybody who reaches {options.host} may use this server; give --api-key"
        )
    serve(uvicorn, options, engine_options)
    return 0


def serve(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    """Until a signal ends it. Raises what kept the model from loading."""
    family_of(options.model)  # a folder that is no checkpoint is refused before anything listens
    listeners = open_listeners(options.host, options.port)
    return_freed_memory_regularly()
    server, engine_thread = build(uvicorn, options, engine_options)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn handles it, and raises it again when it has ended
        signal.signal(number, lambda *event: None)
    engine_thread.start()
    try:
        server.run(sockets=listeners)
    finally:
        engine_thread.stop()
    if engine_thread.failure:
        raise engine_thread.failure


def build(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    """(uvicorn's server, the engine's thread), neither of them running."""
    from runtime.engine.loading.memory import DEFAULT_MAX_NUM_SEQS

    from .engine_thread import EngineThread
    from .prompts import PromptBuilder
    from .routes import create_app
    from .service import Service
    from .telemetry import Telemetry

    def ready_engine():
        engine = open_engine(options.model, engine_options)
        engine.take_cache_memory()
        url = url_of(options.host, options.port)
        ready = f"ready: {', '.join(options.names)} at {url}/v1"
        print_status("\n".join([*engine.describe(), ready]))
        return engine

    def end_server():
        server.should_exit = True

    engine_options = replace(
        engine_options, max_num_seqs=engine_options.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    )
    telemetry = Telemetry(options.names[0])
    engine_thread = EngineThread(ready_engine, end_server, telemetry.record)
    prompts = PromptBuilder(engine_thread, image_rules(options), options.language)
    service = Service(engine_thread, prompts, telemetry, options.names, options.takes_any_name)
    max_in_flight = engine_options.max_num_seqs + options.max_queue
    app = create_app(
        service, options.max_body_bytes, max_in_flight, options.api_key, options.allowed_origins
    )
    server = uvicorn.Server(uvicorn_config(uvicorn, app, options))
    return server, engine_thread


def image_rules(options: ServeOptions):
    from .images import ImageRules

    folder = options.allowed_local_media_path
    return ImageRules(
        max_images=options.limit_images,
        max_bytes=options.max_image_bytes,
        max_pixels=options.max_image_pixels,
        folder=Path(folder) if folder else None,
        domains=options.allowed_media_domains,
    )


def connection_limits(options: ServeOptions):
    """The limits of the options, or what this process may have open files for."""
    from runtime.serve.transport.connection import ConnectionLimits

    in_all = possible_connections(options.max_connections)
    if in_all < options.max_connections:
        print_status(
            f"note: this process may open so few files (ulimit -n) that {in_all} connections are "
            f"taken, not {options.max_connections}"
        )
    return ConnectionLimits(in_all, min(options.max_connections_per_address, in_all))


def uvicorn_config(uvicorn, app, options: ServeOptions):
    from runtime.serve.transport.connection import KEEP_ALIVE_SECONDS, connection_class

    return uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        http=connection_class(connection_limits(options)),
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=options.shutdown_seconds,
        server_header=False,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
