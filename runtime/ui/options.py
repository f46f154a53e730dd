"""Options of `runtime.ui`."""

from dataclasses import dataclass

from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.shared_flags import language_flag, model_flag
from runtime.serve.options import (
    ServeOptions,
    api_key_flag,
    check_port,
    given_api_key,
    host_flag,
    port_flag,
)

# what the service takes by default
MAX_IMAGE_BYTES = ServeOptions.max_image_bytes
MAX_IMAGE_PIXELS = ServeOptions.max_image_pixels


@dataclass(kw_only=True)
class UiOptions:
    """Who answers, and where the page is shown."""

    model: str | None = model_flag(default=None)
    server: str | None = flag(
        "instead of --model: URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000",
        default=None,
        metavar="URL",
    )
    api_key: str | None = api_key_flag("the server's key")
    host: str = host_flag("--server-name")  # as the GLM-Edge guide's web_demo.py spells them
    port: int = port_flag(7860, "--server-port")
    language: str | None = language_flag()

    def __post_init__(self):
        check_choices(self)
        if bool(self.model) == bool(self.server):
            raise ToolkitError("give either --model DIR or --server URL")
        if self.model:
            check_folder("model", self.model)
        else:
            is_url = self.server.startswith(("http://", "https://"))
            require(self, "server", is_url, "use a URL such as http://127.0.0.1:8000")
            server_alone = self.language is None
            require(self, "language", server_alone, "the server words the prompt; leave it out")
        check_port(self, 7860)
        self.api_key = given_api_key(self)
