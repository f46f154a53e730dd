"""Options of `runtime.ui`."""

import os
from dataclasses import dataclass

from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.shared_flags import language_flag, model_flag
from runtime.serve.options import KEY, ServeOptions

MAX_PICTURE = ServeOptions.max_image_bytes
MAX_PIXELS = ServeOptions.max_image_pixels  # what the service takes by default


@dataclass(kw_only=True)
class UiOptions:
    """Who answers, and where the page is shown."""

    model: str | None = model_flag(default=None)
    server: str | None = flag(
        "instead of --model: URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000",
        default=None,
        metavar="URL",
    )
    api_key: str | None = flag(
        f"the server's key; {KEY} in the environment does the same without showing it to other "
        "users of the machine",
        default=None,
        metavar="KEY",
    )
    host: str = flag(
        "address to listen on; 0.0.0.0 for the whole network",
        default="127.0.0.1",
        metavar="ADDRESS",
    )
    port: int = flag("port to listen on", default=7860, kind=int, metavar="N")
    language: str | None = language_flag()

    def __post_init__(self):
        check_choices(self)
        if bool(self.model) == bool(self.server):
            raise ToolkitError("give either --model DIR or --server URL")
        if self.model:
            check_folder("model", self.model)
        else:
            require(
                self,
                "server",
                self.server.startswith(("http://", "https://")),
                "use a URL such as http://127.0.0.1:8000",
            )
            require(
                self, "language", self.language is None, "the server words the prompt; leave it out"
            )
        require(self, "port", 0 < self.port < 65536, "use a port from 1 to 65535, e.g. 7860")
        self.api_key = self.api_key or os.environ.get(KEY)
