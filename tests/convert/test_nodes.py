"""Encoders from the inside: clean ones pass, a planted error is named: in a graph, in a checkpoint, in the dump of an .om."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import paths
import pytest
from damaged_checkpoints import edited
from onnx import helper, numpy_helper

from convert.__main__ import main as convert
from convert.nodes import __main__ as nodes
from models import family_of
from runtime.common.errors import run_command
from runtime.common.files import file_entry
from runtime.compare import __main__ as compare
from runtime.compare.layers import vision_nodes
from runtime.vision import artifact

GOLDEN = paths.GOLDEN
FAMILIES = ("visualglm", "glm4v", "llava", "glm_edge_v")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Family -> its exported encoder, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            assert (
                run_command(
                    convert,
                    ["--model", str(GOLDEN / family), "--out", str(made[family]), "--onnx-only"],
                )
                == 0
            )
        return made[family]

    return make


def run(model, artifact, tmp_path, *more):
    """(exit code, rows of the table)"""
    out = tmp_path / "n.csv"
    code = run_command(
        nodes.main, ["--model", str(model), "--artifact", str(artifact), "--out", str(out), *more]
    )
    return code, list(
        csv.DictReader(out.read_text(encoding="utf-8").splitlines())
    ) if out.exists() else []


def first_failing(table):
    return next(row for row in table if row["IsPrecisionError"] == "YES")


# a graph


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_exports(family, artifacts, tmp_path):
    code, table = run(GOLDEN / family, artifacts(family), tmp_path)
    assert code == 0 and len(table) > 20 and table[-1]["IsOutputNode"] == "YES"


def inside(graph, module):
    """Nodes of a module, in order."""
    return [node for node in graph.node if re.search(rf"(^|\.){re.escape(module)}/", node.name)]


def scale(graph):
    node = next(n for n in inside(graph, "blocks.1.mlp.up") if n.op_type == "MatMul")
    change(graph, node.input[1], lambda weight: weight * np.float32(1.01))
    return "blocks.1.mlp.up"


def swap_query_rows(graph):
    """Of the first head; weights lie as [in, out]."""
    node = next(n for n in inside(graph, "blocks.1.attention.q") if n.op_type == "MatMul")
    change(graph, node.input[1], lambda weight: weight[:, [2, 1, 0, *range(3, weight.shape[1])]])
    return "blocks.1.attention.q"


def change(graph, name, edit):
    tensor = next(t for t in graph.initializer if t.name == name)
    tensor.CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(edit(numpy_helper.to_array(tensor))), name)
    )


def another_epsilon(graph):
    node = next(n for n in inside(graph, "blocks.1.mlp_norm") if n.op_type == "LayerNormalization")
    attribute = next(a for a in node.attribute if a.name == "epsilon")
    attribute.f *= 1000  # ten times moves this tower's values by less than fp32 rounds
    return "blocks.1.mlp_norm"


def another_gelu(graph):
    """tanh's approximation for erf's, erf's for all others; it shows where the next module ends."""
    x, at, down = between(graph)
    if any(node.op_type == "Erf" for node in inside(graph, "blocks.1.mlp")):
        made = formula(
            x,
            "y",
            [
                ("Mul", x, x),
                ("Mul", 0, 0.044715),
                ("Add", 1, 1.0),
                ("Mul", 2, x),
                ("Mul", 3, 0.7978845608),
                ("Tanh", 4),
                ("Add", 5, 1.0),
                ("Mul", 6, x),
                ("Mul", 7, 0.5),
            ],
        )
    else:
        made = formula(
            x,
            "y",
            [("Mul", x, 0.7071067812), ("Erf", 0), ("Add", 1, 1.0), ("Mul", 2, x), ("Mul", 3, 0.5)],
        )
    down.input[0] = made[-1].output[0]
    insert(graph, at, made)
    return "blocks.1.mlp.down"


def overflow(graph):
    """As if the MLP's inner values passed fp16's largest number."""
    x, at, down = between(graph)
    made = formula(
        x, "o", [("Mul", down.input[0], 1e9), ("half", 0), ("single", 1), ("Mul", 2, 1e-9)]
    )
    down.input[0] = made[-1].output[0]
    insert(graph, at, made)
    return "blocks.1.mlp.down"


def between(graph):
    """(what the MLP's first linear layer gives, where its second one begins, that node)"""
    down = next(n for n in inside(graph, "blocks.1.mlp.down") if n.op_type == "MatMul")
    return inside(graph, "blocks.1.mlp.up")[-1].output[0], list(graph.node).index(down), down


def formula(x, prefix, steps):
    """Nodes of a calculation: inputs are names, numbers of earlier steps (int), or constants (float)."""
    made = []
    results = []
    for count, (operator, *inputs) in enumerate(steps):
        for place, value in enumerate(inputs):
            if isinstance(value, float):
                made.append(
                    helper.make_node("Constant", [], [f"{prefix}{count}c"], value_float=value)
                )
                inputs[place] = f"{prefix}{count}c"
            elif isinstance(value, int):
                inputs[place] = results[value]
        cast = {"half": onnx.TensorProto.FLOAT16, "single": onnx.TensorProto.FLOAT}.get(operator)
        results.append(f"{prefix}{count}")
        made.append(
            helper.make_node("Cast", inputs, results[-1:], to=cast)
            if cast
            else helper.make_node(operator, inputs, results[-1:])
        )
    return made


def insert(graph, at, made):
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*kept[:at], *made, *kept[at:]])


def planted(plant, folder, tmp_path):
    """(a copy of the artifact with plant(graph), the module's name)"""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    model = onnx.load(folder / "vision.onnx")
    module = plant(model.graph)
    (copy / "vision.onnx").write_bytes(model.SerializeToString())
    artifact.save(
        copy,
        replace(
            artifact.load(folder),
            files={name: file_entry(copy / name) for name in ("vision.onnx", "vision.onnx.data")},
        ),
    )
    return copy, module


@pytest.mark.parametrize("plant", [scale, swap_query_rows, another_epsilon, another_gelu, overflow])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_node(family, plant, artifacts, tmp_path, capsys):
    folder, module = planted(plant, artifacts(family), tmp_path)
    code, table = run(GOLDEN / family, folder, tmp_path)
    assert code == 1 and first_failing(table)["GroundTruth"].endswith(module)
    said = capsys.readouterr().out
    assert f"{module}) is the first that deviates" in said and ("NaN or Inf" in said) == (
        plant is overflow
    )


@pytest.mark.parametrize("pieces", [1 << 30, 1])
@pytest.mark.parametrize(
    "operator, edit, module",
    [
        (
            "LayerNormalization",
            lambda node: setattr(node.attribute[1], "f", 0.1),
            "tower.blocks.0.attention_norm",
        ),
        (
            "Softmax",
            lambda node: setattr(node.attribute[0], "i", 1),
            "tower.blocks.1.attention.out",
        ),
    ],
)
def test_a_wrong_node_in_pieces(operator, edit, module, pieces, artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.nodes.graph.PIECE_BYTES", pieces)
    folder = tmp_path / "copy"
    shutil.copytree(artifacts("llava"), folder)
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    edit([n for n in model.graph.node if n.op_type == operator][1])
    (folder / "vision.onnx").write_bytes(model.SerializeToString())
    code, table = run(GOLDEN / "llava", folder, tmp_path)
    assert code == 1 and first_failing(table)["GroundTruth"] == module
    assert not (folder / "piece.onnx").exists()


# a checkpoint


def scaled_weight(family, tmp_path):
    """One weight of the tower, of the second block's MLP."""
    victim = next(
        w
        for w in family_of(GOLDEN / family).weights()
        for part in w.parts
        if re.fullmatch(r"vision\.(\w+\.)?blocks\.1\.mlp\.down\.weight", str(part.target))
    )

    def edit(tensors):
        if victim.source in tensors:
            tensors[victim.source] = (tensors[victim.source].float() * 1.01).to(
                tensors[victim.source].dtype
            )

    return edited(GOLDEN / family, tmp_path, edit), "blocks.1.mlp.down"


def config_epsilon(family, tmp_path):
    def config(stored):
        tower, key = (
            ("eva_config", "layernorm_epsilon")
            if family == "visualglm"
            else ("vision_config", "layer_norm_eps")
        )
        stored[tower][key] = stored[tower].get(key, 1e-6) * 1000

    return edited(GOLDEN / family, tmp_path, lambda tensors: None, config), "norm"


def in_process(module, *arguments, **_):
    """For vision_nodes.start_module: the same command without the seconds a process of its own takes."""
    assert module == "convert.nodes"
    run_command(nodes.main, [str(a) for a in arguments])
    return type("Ended", (), {"wait": lambda self: 0})()


@pytest.mark.parametrize(
    "family, plant",
    [(f, scaled_weight) for f in FAMILIES]
    + [(f, config_epsilon) for f in ("visualglm", "glm4v", "llava")],
)
def test_the_report_names_the_vision_module(family, plant, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_nodes, "start_module", in_process)
    bad, module = plant(family, tmp_path)
    argv = [
        "--model",
        str(bad),
        "--reference",
        str(GOLDEN / family),
        "--vision",
        "torch",
        "--out",
        str(tmp_path / "out"),
        "--image",
        str(next(GOLDEN.glob(f"{family}/*.png"), GOLDEN / "glm4v" / "image.png")),
        "--prompt",
        "?",
        "--max-tokens",
        "1",
        "--dtype",
        "float32",
    ]
    assert run_command(compare.main, argv) == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["vision_node"] in found["verdict"] and module in found["vision_node"]
    assert all(stage["passed"] for stage in found["layers"])


def test_the_report_names_the_onnx_node(artifacts, tmp_path):
    """Through the real process."""
    folder, module = planted(another_gelu, artifacts("glm_edge_v"), tmp_path)
    argv = [
        "--model",
        str(GOLDEN / "glm_edge_v"),
        "--vision",
        "onnx",
        "--artifact",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--image",
        str(GOLDEN / "glm_edge_v" / "image_a.png"),
        "--prompt",
        "?",
        "--max-tokens",
        "1",
    ]
    assert run_command(compare.main, argv) == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert f"inside the encoder {module}/" in found["verdict"].replace("tower.", "")
    assert (tmp_path / "out" / "nodes.csv").exists()


# the dump of an .om, made by a stand-in: ONNX Runtime's values in fp16, under the device's names

STAMP = "1682067845380164"


def dump(folder, pixels, out, disturb=lambda name, value: value, leave_out=()):
    model = onnx.load(folder / "vision.onnx")
    floats = {
        v.name
        for v in model.graph.value_info
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    inner = [n for n in model.graph.node if n.output[0] in floats]
    model.graph.output.extend(
        helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in inner
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = [model.graph.output[0].name, *(n.output[0] for n in inner)]
    values = dict(zip(given, session.run(given, {model.graph.input[0].name: pixels})))
    run = out / "20230421" / "0" / "vision" / "1" / "0"
    run.mkdir(parents=True)
    for count, node in enumerate(
        n for n in model.graph.node if n.output[0] in values and n.name not in leave_out
    ):
        value = disturb(node.name, values[node.output[0]]).astype(np.float16)
        name = re.sub(r"[./]", "_", node.name)
        stem = run / f"{node.op_type}.{name}.{count}.3.{STAMP}"
        np.save(f"{stem}.output.0.npy", value) if count % 2 else value.tofile(
            f"{stem}.output.0.bin"
        )
        np.save(f"{stem}.input.0.npy", value)
    np.save(run / f"TransData.trans_TransData_7.99.3.{STAMP}.output.0.npy", np.zeros(3, np.float16))
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_dump(family, artifacts, tmp_path, capsys):
    folder = artifacts(family)
    pixels = tmp_path / "in.npy"
    assert run(GOLDEN / family, folder, tmp_path, "--save-input", str(pixels))[0] == 0
    graph = onnx.load(folder / "vision.onnx", load_external_data=False).graph
    (bias,) = (n for n in inside(graph, "blocks.1.mlp.up") if n.op_type == "Add")
    product = next(n for n in inside(graph, "blocks.1.mlp.up") if n.op_type == "MatMul")
    made = dump(folder, np.load(pixels), tmp_path / "dump", leave_out=[product.name])
    for path in made.glob(f"Add.{re.sub('[./]', '_', bias.name)}.*"):  # as ATC names what it fused
        path.rename(
            made / path.name.replace("Add.", f"MatMulAdd.{re.sub('[./]', '_', product.name)}", 1)
        )
    code, table = run(GOLDEN / family, folder, tmp_path, "--dump", str(tmp_path / "dump"))
    rows = {row["GroundTruth"]: row for row in table}
    assert code == 0 and "TransData" in rows["*"]["NPUDump"] and rows["*"]["IsNpuOps"] == "YES"
    assert rows[product.name]["CompareFailReason"].startswith("no such operator")
    assert (
        rows[bias.name]["OpType"] == "MatMulAdd"
        and float(rows[bias.name]["CosineSimilarity"]) > 0.9999
    )
    assert (
        f"1 not compared, operator of the .om alone: TransData.trans_TransData_7.99.3.{STAMP}"
        in capsys.readouterr().out
    )


LAX = ("cosine_min=0.1", "relative-euclidean=2", "kl=9", "rmse=99", "mean_relative=1e9")


@pytest.mark.parametrize(
    "limit, code", [([], 1), ([word for limit in LAX for word in ("--limit", limit)], 0)]
)
def test_dump_with_one_node_disturbed(limit, code, artifacts, tmp_path, capsys):
    folder = artifacts("glm_edge_v")
    rng = np.random.default_rng(0)
    graph = onnx.load(folder / "vision.onnx", load_external_data=False).graph
    victim = inside(graph, "blocks.1.attention.out")[-1].name
    pixels = tmp_path / "in.npy"
    run(GOLDEN / "glm_edge_v", folder, tmp_path, "--save-input", str(pixels))

    def disturb(name, value):
        return value + value.std() * rng.normal(size=value.shape) * 0.3 if name == victim else value

    dump(folder, np.load(pixels), tmp_path / "dump", disturb)
    capsys.readouterr()
    found, table = run(
        GOLDEN / "glm_edge_v", folder, tmp_path, "--dump", str(tmp_path / "dump"), *limit
    )
    assert found == code
    if code:
        assert [row["GroundTruth"] for row in table if row["IsPrecisionError"] == "YES"] == [victim]
        assert f"ONNX node {victim}) is the first that deviates" in capsys.readouterr().out


def test_overflow_in_a_dump(artifacts, tmp_path, capsys):
    folder = artifacts("llava")
    pixels = tmp_path / "in.npy"
    run(GOLDEN / "llava", folder, tmp_path, "--save-input", str(pixels))
    dump(
        folder,
        np.load(pixels),
        tmp_path / "dump",
        lambda name, value: value * (1e9 if "1.mlp.up/" in name else 1),
    )
    assert run(GOLDEN / "llava", folder, tmp_path, "--dump", str(tmp_path / "dump"))[0] == 1
    assert "blocks.1.mlp.up" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "name, sentence",
    [
        (f"MatMul.x.1.2.{STAMP}", "msaccucmp.py convert -d"),
        ("x.txt", "has no file like"),
        (f"MatMul.x.1.2.{STAMP}.output.0.npy", "is named after a node"),
    ],
)
def test_dumps_that_cannot_be_read(name, sentence, artifacts, tmp_path, capsys):
    (tmp_path / "dump").mkdir()
    np.save(tmp_path / "dump" / "z.npy", np.zeros(2))
    (tmp_path / "dump" / "z.npy").rename(tmp_path / "dump" / name)
    assert run(GOLDEN / "llava", artifacts("llava"), tmp_path, "--dump", str(tmp_path / "dump"))[
        0
    ] in (1, 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--model", str(GOLDEN / "glm4")], "is a text model"),
        (["--artifact", "/nowhere"], "there is no vision.onnx"),
        (["--limit", "cosine=0.9"], "names no measure"),
        (["--candidate", str(GOLDEN / "llava")], "give either"),
        (["--dump", "none"], "does not exist"),
        (["--image", "none.png"], "none.png"),
    ],
)
def test_mistakes(given, sentence, artifacts, tmp_path, capsys):
    assert run(GOLDEN / "llava", artifacts("llava"), tmp_path, *given)[0] == 2
    assert sentence in capsys.readouterr().err


def test_an_artifact_of_another_model(artifacts, tmp_path):
    assert run(GOLDEN / "visualglm", artifacts("llava"), tmp_path)[0] == 1
