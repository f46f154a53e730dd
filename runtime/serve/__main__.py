"""`python -m runtime.serve`: one model behind OpenAI's HTTP API, for many clients at once.

Listens on 127.0.0.1, fetches nothing, reads no file and logs no prompt unless told otherwise; see docs/serving.md.
"""
import os
import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command
from runtime.common.flags import EngineOptions, Parser, check_choices, check_folder, flag, require

KEY = "ASCEND_VLM_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
HEADER_BYTES = 65536
HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")


@dataclass(kw_only=True)
class ServeOptions:
    """What is served, to whom, and how much of it."""
    model: str = flag("folder of a downloaded checkpoint", "-m", "--model-path", metavar="DIR")
    host: str = flag("address to listen on; 0.0.0.0 for the whole network", default="127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on", default=8000, kind=int, metavar="N")
    api_key: str | None = flag(f"clients must send it; {KEY} in the environment does the same without showing it to other "
                               "users of the machine", default=None, metavar="KEY")
    served_model_name: str | None = flag("name that clients use (default: the folder's)", default=None, metavar="NAME")
    language: str | None = flag("wording of the prompt around the question (default: as released)", default=None,
                                choices=("zh", "en"))
    max_queue: int = flag("requests that may wait while others are computed; more get status 429", default=64, kind=int,
                          metavar="N")
    max_body_bytes: int = flag("largest request body", default=20 << 20, kind=int, metavar="N")
    limit_images: int = flag("pictures in one request", default=4, kind=int, metavar="N")
    max_image_bytes: int = flag("largest picture file", default=10 << 20, kind=int, metavar="N")
    max_image_pixels: int = flag("largest picture, width x height", default=50_000_000, kind=int, metavar="N")
    allowed_local_media_path: str | None = flag("folder whose pictures clients may name as file:///... (default: none)",
                                                default=None, metavar="DIR")
    allowed_media_domains: tuple[str, ...] = flag("host, or host:port, whose pictures clients may name as http(s) URLs; "
                                                  "repeat it for more (default: none, nothing is fetched)", default=(),
                                                  metavar="HOST", many=True)
    shutdown_seconds: int = flag("time that answers under way get at the end", default=30, kind=int, metavar="N")

    def __post_init__(self):
        check_choices(self)
        check_folder("model", self.model)
        if self.allowed_local_media_path is not None:
            check_folder("allowed_local_media_path", self.allowed_local_media_path)
        self.allowed_media_domains = tuple(host.lower() for host in self.allowed_media_domains)
        require(self, "allowed_media_domains", all(map(HOST.fullmatch, self.allowed_media_domains)),
                "give host names without http:// or path, e.g. images.example.com or images.example.com:8443")
        require(self, "port", 0 < self.port < 65536, "use a port from 1 to 65535, e.g. 8000")
        for name in ("max_queue", "limit_images", "shutdown_seconds"):
            require(self, name, getattr(self, name) >= 0, "0 or more is needed")
        for name in ("max_body_bytes", "max_image_bytes", "max_image_pixels"):
            require(self, name, getattr(self, name) >= 1, "1 or more is needed")
        self.api_key = self.api_key or os.environ.get(KEY)
        self.served_model_name = self.served_model_name or Path(self.model).resolve().name


def main(argv) -> int:
    options, engine_options = Parser(
        "python -m runtime.serve", "--model DIR [--port N] [options]",
        "Serves a model to many clients at once through OpenAI's HTTP API: /v1/chat/completions, /v1/completions, "
        "/v1/models, and /tokenize, /detokenize, /health, /version, /metrics.",
        {"service": ServeOptions, "model": EngineOptions}).parse(argv)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ToolkitError(f"the service needs {error.name}; run: pip install 'ascend-vlm[serve]'",
                           MISSING_COMPONENT) from None
    if options.host not in LOCAL and not options.api_key:
        print(f"warning: anybody who reaches {options.host} may use this server; give --api-key", file=sys.stderr)
    serve(uvicorn, options, engine_options)
    return 0


def serve(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    """Until a signal ends it. Raises what kept the model from loading."""
    from models import family_of
    family_of(options.model)            # a folder that is no checkpoint is told before anything listens
    server, worker = build(uvicorn, options, engine_options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *event: None)      # uvicorn hears it, and raises it again when it has ended
    worker.start()
    try:
        server.run()
    finally:
        worker.stop()
    if worker.failure:
        raise worker.failure


def build(uvicorn, options: ServeOptions, engine_options: EngineOptions):
    from runtime.plan.__main__ import SEQUENCES

    from .engine_thread import Worker
    from .pictures import PictureRules
    from .routes import Service, create_app
    from .telemetry import Telemetry

    def open_engine():
        from runtime import Engine
        engine = Engine(options.model, **vars(engine_options))
        where = f"http://{options.host}:{options.port}"
        print("\n".join([*engine.describe(), f"ready: {options.served_model_name} at {where}/v1"]), file=sys.stderr)
        return engine

    def end_server():
        server.should_exit = True

    engine_options = replace(engine_options, max_num_seqs=engine_options.max_num_seqs or SEQUENCES)
    telemetry = Telemetry(options.served_model_name)
    worker = Worker(open_engine, end_server, telemetry.finished)
    folder = options.allowed_local_media_path
    rules = PictureRules(options.limit_images, options.max_image_bytes, options.max_image_pixels, folder and Path(folder),
                         options.allowed_media_domains)
    service = Service(worker, options.served_model_name, rules, telemetry, options.language)
    app = create_app(service, options.max_body_bytes, engine_options.max_num_seqs + options.max_queue, options.api_key)
    server = uvicorn.Server(uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", access_log=False, http="h11", ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=options.shutdown_seconds, server_header=False))
    return server, worker


if __name__ == "__main__":
    sys.exit(run_command(main))
