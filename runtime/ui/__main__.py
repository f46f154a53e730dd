"""`python -m runtime.ui`: a page to talk with a model about images, on an engine of its own or on a
server's URL.

Takes options, serves the page until a signal ends it. The page asks nobody but this process: no
font, script, image or statistics of another site, which a content policy makes the browser enforce.
"""

import os
import signal
import sys
import tempfile
import threading

from runtime.common.allocator import return_freed_memory_regularly
from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command
from runtime.common.flags import Parser
from runtime.common.progress import print_status
from runtime.engine.command import join_torchrun
from runtime.engine.options import EngineOptions, SamplingParams
from runtime.serve.options import LOCAL
from runtime.serve.transport.listen import check_address, url_of

from .options import UiOptions


def main(argv) -> int:
    options, engine_options, sampling = Parser(
        "python -m runtime.ui",
        "(--model DIR | --server URL) [options]",
        "A page in the browser: pictures, streamed answers, sampling; in English and Chinese, "
        "light and dark.",
        {
            "page": UiOptions,
            "model": EngineOptions,
            "where the page's sliders begin": SamplingParams,
        },
    ).parse(argv)
    join_torchrun(engine_options)
    if options.server and engine_options != EngineOptions():
        raise ToolkitError("--server runs its own engine; leave out the options of the model")
    # both before gradio is imported
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # visitors' uploads are deleted with it
        check_packages()
        if options.host not in LOCAL:
            print_status(f"warning: anybody who reaches {options.host} may use this page")
        check_address(options.host, options.port)
        return_freed_memory_regularly()
        with open_backend(options, engine_options) as backend:
            show(backend, options, sampling)
    return 0


def check_packages():
    try:
        import gradio  # noqa: F401
        import openai  # noqa: F401
    except ImportError as error:
        raise ToolkitError(
            f"the page needs {error.name}; run: pip install 'ascend-vlm[ui]'", MISSING_COMPONENT
        ) from None


def open_backend(options: UiOptions, engine_options: EngineOptions):
    from .backends import Local, Remote

    return Remote(options) if options.server else Local(options, engine_options)


def show(backend, options: UiOptions, sampling: SamplingParams):
    """The page until a signal ends it."""
    from .page import build_page, launch

    ended = threading.Event()
    page = launch(build_page(backend, sampling), options.host, options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *event: ended.set())
    print_status(f"ready: {backend.name} at {url_of(options.host, options.port)}")
    ended.wait()
    page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
