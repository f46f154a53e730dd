"""Options of `runtime.serve`, and the flags that `runtime.ui` listens with, too."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.shared_flags import language_flag, media_path, model_flag

KEY = "ASCEND_VLM_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
ANY_NAME = "*"
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)
AT_LEAST_ONE = (
    "max_body_bytes",
    "max_image_bytes",
    "max_image_pixels",
    "max_connections",
    "max_connections_per_address",
)
HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")


def host_flag(*aliases: str):
    return flag(
        "address to listen on; 0.0.0.0 for the whole network",
        *aliases,
        default="127.0.0.1",
        metavar="ADDRESS",
    )


def port_flag(default: int, *aliases: str):
    return flag("port to listen on", *aliases, default=default, kind=int, metavar="N")


def check_port(options, example: int):
    fits = 0 < options.port < 65536
    require(options, "port", fits, f"use a port from 1 to 65535, e.g. {example}")


def api_key_flag(use: str):
    return flag(
        f"{use}; {KEY} in the environment does the same without showing it to other users of the "
        "machine",
        default=None,
        metavar="KEY",
    )


def given_api_key(options) -> str | None:
    """ToolkitError for an empty --api-key, such as that of a shell's variable which is not set: the
    user takes the server for guarded."""
    fits = options.api_key is None or bool(options.api_key.strip())
    require(options, "api_key", fits, "the key is empty; give one, or leave the flag out")
    return options.api_key or os.environ.get(KEY)


@dataclass(kw_only=True)
class ServeOptions:
    """What is served, to whom, and how much of it."""

    model: str = model_flag()
    host: str = host_flag()
    port: int = port_flag(8000)
    api_key: str | None = api_key_flag("clients must send it")
    served_model_name: tuple[str, ...] = flag(
        "name that clients use (default: the folder's); repeat it for more; '*' takes any name",
        default=(),
        metavar="NAME",
        many=True,
    )
    language: str | None = language_flag()
    max_queue: int = flag(
        "requests that may wait while others are computed; more get status 429",
        default=64,
        kind=int,
        metavar="N",
    )
    max_body_bytes: int = flag("largest request body", default=20 << 20, kind=int, metavar="N")
    limit_images: int = flag("pictures in one request", default=4, kind=int, metavar="N")
    max_image_bytes: int = flag("largest picture file", default=10 << 20, kind=int, metavar="N")
    max_image_pixels: int = flag(
        "largest picture, width x height", default=50_000_000, kind=int, metavar="N"
    )
    allowed_local_media_path: str | None = flag(
        "folder whose pictures clients may name as file:///... (default: none)",
        default=None,
        metavar="DIR",
    )
    allowed_media_domains: tuple[str, ...] = flag(
        "host, or host:port, whose pictures clients may name as http(s) URLs; "
        "repeat it for more (default: none, nothing is fetched)",
        default=(),
        metavar="HOST",
        many=True,
    )
    allowed_origins: tuple[str, ...] = flag(
        "site whose pages may use this server from a browser, e.g. https://chat.example.com; "
        "'*' for all; repeat it for more (default: none)",
        default=(),
        metavar="ORIGIN",
        many=True,
    )
    max_connections: int = flag(
        "connections in all; more get status 429", default=512, kind=int, metavar="N"
    )
    max_connections_per_address: int = flag(
        "connections of one address; raise it behind a proxy", default=256, kind=int, metavar="N"
    )
    shutdown_seconds: int = flag(
        "time that answers under way get at the end", default=30, kind=int, metavar="N"
    )

    def __post_init__(self):
        check_choices(self)
        check_folder("model", self.model)
        media_path(self)
        self.allowed_media_domains = tuple(host.lower() for host in self.allowed_media_domains)
        require(
            self,
            "allowed_media_domains",
            all(map(HOST.fullmatch, self.allowed_media_domains)),
            "give host names without http:// or path, e.g. images.example.com or "
            "images.example.com:8443",
        )
        check_port(self, 8000)
        for name in ("max_queue", "limit_images", "shutdown_seconds"):
            require(self, name, getattr(self, name) >= 0, "0 or more is needed")
        for name in AT_LEAST_ONE:
            require(self, name, getattr(self, name) >= 1, "1 or more is needed")
        self.api_key = given_api_key(self)
        self.served_model_name = tuple(self.served_model_name)
        names_fit = all(name.strip() for name in self.served_model_name)
        require(self, "served_model_name", names_fit, "give a name, e.g. glm")
        self.allowed_origins = tuple(origin.lower() for origin in self.allowed_origins)
        require(
            self,
            "allowed_origins",
            all(map(ORIGIN.fullmatch, self.allowed_origins)),
            "give origins without a path, e.g. https://chat.example.com or http://localhost:3000",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which the model is listed, at least one."""
        given = tuple(name for name in self.served_model_name if name != ANY_NAME)
        return given or (Path(self.model).resolve().name,)

    @property
    def takes_any_name(self) -> bool:
        return ANY_NAME in self.served_model_name
