"""Flags of the service that cannot be as they are given: one sentence, before a model is loaded."""

import paths
import pytest

from runtime.common.errors import ToolkitError
from runtime.serve.options import KEY, ServeOptions

MODEL = str(paths.GOLDEN / "glm_edge")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 0}, "--port is 0"),
        ({"port": 70000}, "--port is 70000"),
        ({"api_key": ""}, "--api-key .*the key is empty"),
        ({"api_key": " "}, "--api-key .*the key is empty"),
        ({"served_model_name": ["a", ""]}, "--served-model-name .*give a name"),
        ({"allowed_origins": ["https://a.example/"]}, "--allowed-origins .*without a path"),
        ({"allowed_origins": ["a.example"]}, "--allowed-origins "),
        ({"allowed_media_domains": ["http://a"]}, "--allowed-media-domains .*without http://"),
        ({"allowed_local_media_path": "/no/such"}, "media-path .*there is no such folder"),
        ({"allowed_local_media_path": __file__}, "media-path .*there is no such folder"),
        ({"max_queue": -1}, "--max-queue is -1"),
        ({"model": "/no/such"}, "--model /no/such does not exist"),
    ],
)
def test_one_sentence_names_the_flag(given, words):
    with pytest.raises(ToolkitError, match=words):
        ServeOptions(**{"model": MODEL, **given})


def test_a_key_of_the_environment(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    assert ServeOptions(model=MODEL).api_key == "secret"
    assert ServeOptions(model=MODEL, api_key="other").api_key == "other"
    monkeypatch.setenv(KEY, "")
    assert not ServeOptions(model=MODEL).api_key


def test_origins_as_browsers_write_them():
    options = ServeOptions(model=MODEL, allowed_origins=["https://A.Example:8443", "*"])
    assert options.allowed_origins == ("https://a.example:8443", "*")
