"""Folders of strangers: every damage of a side file, header, template or tokenizer ends in one sentence or does no harm."""

import json
import os
import shutil
import struct

import paths
import pytest

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import stored_weights
from models.errors import ModelError
from models.prompt import tokenizer_limits
from models.prompt.chat_template import ChatTemplate
from models.prompt.tokenizers.json_file import JsonTokenizer
from models.prompt.tokenizers.ranks import TiktokenTokenizer
from models.side_files import read_json

FAMILIES = ("glm4", "glm4v", "glm_edge", "glm_edge_v", "llava", "visualglm")
DEEP = json.loads("[" * 40 + "]" * 40)
STRANGE = (None, "4", [], {}, -1, 10**9, 0.5, DEEP)
HELLO = [{"role": "user", "content": "hello"}]


def places(config, where=()):
    """The way to every field, those of tables in it too."""
    for name, value in config.items():
        yield (*where, name)
        if isinstance(value, dict):
            yield from places(value, (*where, name))


def fields():
    for family in FAMILIES:
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            file = paths.GOLDEN / family / name
            for place in places(json.loads(file.read_text())) if file.is_file() else ():
                if "added_tokens_decoder" not in place[:-1] and "auto_map" not in place:
                    yield pytest.param(family, name, place, id=f"{family}-{name}-{'.'.join(place)}")


def use(folder):
    """As a command does up to the first step, without reading weights."""
    family = family_of(folder)
    Checkpoint(folder).check(stored_weights(family))
    if family.vision:
        family.vision_encoder()
    family.prompt(HELLO)
    return family.sampling(False), family.stop_ids


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """The tokenizer files here are sound: they need no trial in a process of their own."""
    monkeypatch.setattr(tokenizer_limits, "is_trial", True)


@pytest.fixture
def copy(tmp_path):
    """The golden folder of a family, its weights as links."""

    def make(family):
        for file in (paths.GOLDEN / family).iterdir():
            if "safetensors" in file.name and not file.name.endswith(".json"):
                (tmp_path / file.name).symlink_to(file)
            elif file.is_file():
                shutil.copyfile(file, tmp_path / file.name)
        return tmp_path

    return make


@pytest.mark.parametrize("family, name, place", fields())
def test_every_field_is_used_or_refused(copy, family, name, place):
    folder = copy(family)
    config = json.loads((folder / name).read_text())
    table = config
    for part in place[:-1]:
        table = table[part]
    for value in STRANGE:
        table[place[-1]] = value
        (folder / name).write_text(json.dumps(config))
        try:
            use(folder)
        except ModelError as error:
            assert len(str(error)) < 5000


@pytest.mark.parametrize(
    "family, place",
    [
        ("glm_edge", "vision_config"),
        ("glm4", "vision_config"),
        ("llava", "text_config.attention_bias"),
        ("llava", "text_config.mlp_bias"),
        ("llava", "text_config.max_position_embeddings"),
        ("visualglm", "inner_hidden_size"),
    ],
)
def test_null_is_absent(copy, family, place):
    folder = copy(family)
    config = json.loads((folder / "config.json").read_text())
    *tables, field = place.split(".")
    table = config
    for part in tables:
        table = table[part]
    table[field] = None
    (folder / "config.json").write_text(json.dumps(config))
    use(folder)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("num_hidden_layers", 10**8, "says num_hidden_layers 100000000, .* from 1 to 1,000"),
        ("num_hidden_layers", "3", "says num_hidden_layers '3'"),
        ("num_attention_heads", 0, "says num_attention_heads 0"),
        ("num_attention_heads", 5, "2 key/value heads do not divide"),
        ("head_dim", 7, "7 dimensions"),
        ("rms_norm_eps", float("nan"), "says rms_norm_eps nan"),
        ("vision_config", "no", "says vision_config 'no', which must be a table"),
        ("vision_config", {"patch_size": 500}, "0 patches along a side"),
        ("vision_config", {"patch_size": "x" * 10**6}, "vision_config.patch_size 'xx"),
    ],
)
def test_a_sentence_names_file_and_field(copy, field, value, words):
    folder = copy("glm_edge")
    config = json.loads((folder / "config.json").read_text()) | {field: value, "boi_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as caught:
        use(folder)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 500


TEXT = '{"a": "好"}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_are_read(tmp_path, encoding):
    (tmp_path / "x.json").write_bytes(TEXT.encode(encoding))
    assert read_json(tmp_path / "x.json") == {"a": "好"}


@pytest.mark.parametrize(
    "content, words",
    [
        (TEXT.encode("gbk"), "UTF-8"),
        (b"[1]", "JSON object"),
        (b"null", "holds null"),
        (b'{"a": 1, "a": 2}', "two values of 'a'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b" " * ((16 << 20) + 1), "more than 16 MB"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError, match=f"x.json .*{words}"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_a_pipe_is_refused_at_once(copy, name):
    folder = copy("glm_edge")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is a named pipe"):
        use(folder)


def test_weights_that_are_a_pipe(copy):
    folder = copy("glm_edge")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match="is a named pipe, not a weight file"):
        use(folder)


def test_counts_of_shards(tmp_path):
    (tmp_path / "model-00001-of-99999999999.safetensors").touch()
    with pytest.raises(ModelError, match="one of 99,999,999,999 files.*10,000"):
        Checkpoint(tmp_path)
    index = {"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(100_000)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names 100,000 files.*10,000"):
        Checkpoint(tmp_path)


def header(**changed):
    item = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changed
    return json.dumps({"x": item}).encode()


@pytest.mark.parametrize(
    "content",
    [
        header(data_offsets=[0.0, 4.0]),
        header(data_offsets=[4, 0]),
        header(shape=[1e9]),
        header(shape=[10**30]),
        header(shape=[1] * 10**5),
        header(shape="1"),
        header(dtype=[]),
        b'{"x": []}',
        b"[" * 200_000,
        b"\xff",
        b"[]",
    ],
)
def test_headers(tmp_path, content):
    file = struct.pack("<Q", len(content)) + content + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(file)
    with pytest.raises(ModelError, match="damaged header"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "in time"),
        ("{{ strftime_now('%Y' * 99999999) }}", "memory|most"),
        ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "memory"),
        ("{{ ('ab ' * 3000000) | wordwrap(1) }}", "in time|memory|most"),
        ("{{ 'a' * 20000000 }}", "memory|most"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deeply|Jinja|in time"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested"),
        ("{{ '\\ud800' }}", "no text"),
        ("{{ messages.x.y }}", "cannot render"),
    ],
)  # fmt: skip
def test_a_template_ends(source, words):
    with pytest.raises(ModelError, match=words):
        ChatTemplate(source, origin="t").render(HELLO)
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO) == "hello"


def steps(count, content, pattern):
    replace = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [replace] * count}


@pytest.mark.parametrize(
    "normalizer",
    [
        steps(9, "a" * 20, {"Regex": "."}),
        steps(9, "a" * 20, {"String": "a"}),
        steps(1, "a", {"String": ""}),
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 9},
    ],
)
def test_a_tokenizer_that_grows_without_end(copy, normalizer):
    file = copy("glm_edge") / "tokenizer.json"
    content = json.loads(file.read_text()) | {"normalizer": normalizer}
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="tokenizer.json has a normalizer .* times as long"):
        JsonTokenizer(file)


@pytest.mark.parametrize("content", ["", "YQ== 0\nYg== 5\n", "YQ== 99999999999\n", "YQ== -1\n"])
def test_ranks_with_gaps(tmp_path, content):
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(ModelError, match="256 bytes, and ranks from 0 up"):
        TiktokenTokenizer(tmp_path / "tokenizer.model")


def config(**fields):
    def change(folder):
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | fields))

    return change


def without_config(name):
    def change(folder):
        (folder / "config.json").unlink()
        (folder / name).write_text("{}")

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (
            config(quantization_config={"quant_method": "gptq"}),
            "quantised by 'gptq'.*float release",
        ),
        (config(quantization_config={"load_in_4bit": True}), "quantised by 'another tool'"),
        (config(quantization={"bits": 4}), "MLX"),
        (without_config("adapter_config.json"), "LoRA adapter.*merge"),
        (without_config("model_index.json"), "diffusers"),
        (without_config("glm.gguf"), "GGUF"),
        (without_config("openvino_model.xml"), "OpenVINO"),
        (lambda d: (d / "snapshots/abc").mkdir(parents=True), "hub's cache; use --model .*abc"),
    ],
)
def test_folders_of_other_kinds(copy, change, words):
    folder = copy("glm_edge")
    change(folder)
    with pytest.raises(ModelError, match=words):
        family_of(folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("base_model.model.x.q_proj.lora_A.default.weight", "LoRA that is not merged.*merge it"),
        ("x.query_key_value.matrix_A.0", "SAT"),
        ("x.q_proj.qweight", "GPTQ or AWQ"),
        ("x.q_proj.weight.absmax", "bitsandbytes"),
        ("x.q_proj.weight_packed", "compressed-tensors"),
        ("x.q_proj.weight_scale_inv", "FP8"),
        ("x.q_proj.biases", "MLX"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, name, words):
    content = json.dumps({name: {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = struct.pack("<Q", len(content)) + content + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(file)
    with pytest.raises(ModelError, match=words):
        Checkpoint(tmp_path).check([])


def test_hidden_files_are_no_weights(copy):
    folder = copy("glm_edge")
    (folder / "._model.safetensors").write_bytes(b"Mac OS X")
    use(folder)
