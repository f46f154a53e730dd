"""`python -m runtime.serve`: one model behind OpenAI's HTTP API, for many clients at once.

Listens on 127.0.0.1, fetches nothing, reads no file and logs no prompt unless told otherwise; see docs/serving.md.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command
from runtime.common.flags import Parser
from runtime.engine.command import join_torchrun, open_engine
from runtime.engine.options import EngineOptions

from .options import LOCAL, ServeOptions

HEADER_BYTES = 65536


def main(argv) -> int:
    options, engine_options = Parser(
        "python -m runtime.serve",
        "--model DIR [--port N] [options]",
        "Serves a model to many clients at once through OpenAI's HTTP API: /v1/chat/completions, /v1/completions, "
        "/v1/models, and /tokenize, /detokenize, /health, /version, /metrics.",
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
        print(
            f"warning: anybody who reaches {options.host} may use this server; give --api-key",
            file=sys.stderr,
        )
    serve(uvicorn, options, engine_options)
    return 0


def serve(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    """Until a signal ends it. Raises what kept the model from loading."""
    from models import family_of

    family_of(options.model)  # a folder that is no checkpoint is told before anything listens
    server, worker = build(uvicorn, options, engine_options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, lambda *event: None
        )  # uvicorn hears it, and raises it again when it has ended
    worker.start()
    try:
        server.run()
    finally:
        worker.stop()
    if worker.failure:
        raise worker.failure


def build(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    from runtime.engine.loading.memory import SEQUENCES

    from .engine_thread import Worker
    from .pictures import PictureRules
    from .routes import create_app
    from .service import Service
    from .telemetry import Telemetry

    def ready_engine():
        engine = open_engine(options.model, engine_options)
        where = f"http://{options.host}:{options.port}"
        print(
            "\n".join([*engine.describe(), f"ready: {options.served_model_name} at {where}/v1"]),
            file=sys.stderr,
        )
        return engine

    def end_server():
        server.should_exit = True

    engine_options = replace(engine_options, max_num_seqs=engine_options.max_num_seqs or SEQUENCES)
    telemetry = Telemetry(options.served_model_name)
    worker = Worker(ready_engine, end_server, telemetry.finished)
    folder = options.allowed_local_media_path
    rules = PictureRules(
        options.limit_images,
        options.max_image_bytes,
        options.max_image_pixels,
        folder and Path(folder),
        options.allowed_media_domains,
    )
    service = Service(worker, options.served_model_name, rules, telemetry, options.language)
    app = create_app(
        service,
        options.max_body_bytes,
        engine_options.max_num_seqs + options.max_queue,
        options.api_key,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            http="h11",
            ws="none",
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=options.shutdown_seconds,
            server_header=False,
        )
    )
    return server, worker


if __name__ == "__main__":
    sys.exit(run_command(main))
