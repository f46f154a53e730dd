"""Encoders of pictures of any size: one graph, and one .om whose gear does not change a feature."""

import sys

import numpy as np
import onnx
import paths
import pytest
from atc_tools import convert, install

from convert.atc.option_rules import parse_patch_gears
from convert.atc.patch_gears import default_gears
from models import family_of
from models.checkpoint import Checkpoint
from models.prompt.patches import Patches
from runtime.common.errors import ToolkitError
from runtime.vision import artifact, patch_sessions
from runtime.vision.choose import open_om, open_onnx
from runtime.vision.source import Source

pytest_plugins = ["atc_fixtures"]
FP32 = ("--atc-arg", "output_type=FP32")
GEARS = "48,64,96,256"


@pytest.fixture(scope="module", params=["glm_ocr", "glm41v"])
def folder(request, surroundings, tmp_path_factory):
    """(family, its artifact with an .om in four gears)"""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        install(root / "cann", patch)
        model = paths.GOLDEN / request.param
        code, text = convert(root / "out", "--gears", GEARS, *FP32, model=model)
    assert code == 0 and (root / "out" / "vision.om").is_file(), text
    return family_of(model), root / "out"


@pytest.fixture(params=["2023", "2024", "2026"])
def ais_bench(request, monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] in ("ais_bench", "aclruntime"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(paths.TESTS / "ascend" / request.param))
    monkeypatch.syspath_prepend(str(paths.TESTS / "ascend"))
    yield
    for name in [*sys.modules]:
        if name.split(".")[0] in ("ais_bench", "aclruntime"):
            del sys.modules[name]


def picture(family, name="wide") -> Patches:
    arrays = np.load(family.directory / "golden.npz")
    rows = arrays[f"{name}__pixel_values"]
    return family.pixels({"pixel_values": rows, "grid_thw": arrays[f"{name}__grid_thw"][0]})


def features_of(family, name) -> np.ndarray:
    return np.load(family.directory / "golden.npz")[f"{name}__image_features"]


def test_the_graph_is_free_in_patches_only(folder):
    family, out = folder
    graph = onnx.load(out / "vision.onnx", load_external_data=False).graph
    names = {value.name for value in graph.input}
    assert names == set(family.vision.widths)
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        assert (
            dims[0].dim_param == "patches" and dims[1].dim_value == family.vision.widths[value.name]
        )
    operators = {node.op_type for node in graph.node}
    assert operators.isdisjoint(
        {"Shape", "Gather", "GridSample", "Expand", "Where", "Range", "Cast"}
    )
    manifest = artifact.load(out)
    assert [entry["name"] for entry in manifest.input] == list(family.vision.widths)
    assert manifest.om["gears"] == [48, 64, 96, 256]


def test_features_do_not_depend_on_the_gear(folder, ais_bench):
    """The inputs of an .om are fp16, so that it is compared with itself; golden values are further
    away."""
    family, out = folder
    session = open_om(out / "vision.om", family)
    one = picture(family)
    expected = features_of(family, "wide")
    found = []
    for gear in session.model.gears:
        session.model.gears = (gear,)
        found.append(session.encode_all([one])[0])
    session.close()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    np.testing.assert_allclose(found[0], expected, atol=5e-3)


def test_pictures_share_a_gear_and_do_not_see_each_other(folder, ais_bench):
    family, out = folder
    names = ("wide", "tall", "tiny", "uneven")
    session = open_om(out / "vision.om", family)
    together = session.encode_all([picture(family, name) for name in names])
    alone = [session.encode_all([picture(family, name)])[0] for name in names]
    session.close()
    for first, second in zip(together, alone):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_picture_larger_than_the_largest_gear(folder, ais_bench):
    family, out = folder
    session = open_om(out / "vision.om", family)
    large = family.pixels(paths.GOLDEN / "llava" / "image_a.png")
    session.model.gears = (48,)
    with pytest.raises(ToolkitError, match="whose largest gear is 48.*--gears up to"):
        session.encode_all(
            [Patches(np.tile(large.rows, (9, 1)), (18, large.grid[0] * large.grid[1] // 2))]
        )
    session.close()


def test_onnx_of_several_pictures(folder):
    family, out = folder
    names = ("wide", "uneven")
    session = open_onnx(Source(family, Checkpoint(family.directory)), out, 1)
    for name, rows in zip(names, session.encode_all([picture(family, name) for name in names])):
        np.testing.assert_allclose(rows, features_of(family, name), atol=2e-5)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("256", "2 to 100 different numbers"),
        ("256,256", "different"),
        ("256,1023", "multiple of 4"),
        ("64,128", "256 at least"),
        ("0,4", "multiple of 4"),
        ("a,b", "numbers of patches"),
    ],
)
def test_gears_that_cannot_be(text, complaint):
    with pytest.raises(ToolkitError, match=complaint):
        parse_patch_gears(text)


def test_gears_end_with_the_largest_picture():
    family = family_of(paths.GOLDEN / "glm_ocr")
    assert default_gears(family) == (256, 1024, 2304, 4096, 6400, 10816)


def test_options_of_the_other_kind_of_pictures(surroundings, tmp_path):
    code, text = convert(tmp_path / "a", "--aipp", model=paths.GOLDEN / "glm_ocr")
    assert code == 2 and "--aipp is for pictures of one size" in text
    code, text = convert(tmp_path / "b", "--gears", "64,256")
    assert code == 2 and "use --dynamic-batch" in text


def test_a_picture_too_large_for_onnx_runtime(folder, monkeypatch):
    """--vision auto encodes it in torch; otherwise it is refused where the memory is short."""
    family, out = folder
    source = Source(family, Checkpoint(family.directory))
    session = open_onnx(source, out, 1, fall_back=True)
    session.most_patches = 39
    session.graph = None  # is not asked
    [rows] = session.encode_all([picture(family)])
    np.testing.assert_allclose(rows, features_of(family, "wide"), atol=2e-5)
    monkeypatch.setattr(patch_sessions, "available_memory", lambda: 1000)
    with pytest.raises(ToolkitError, match="40 patches needs .* use --vision torch"):
        open_onnx(source, out, 1).encode_all([picture(family)])


def test_features_of_another_shape_are_refused(folder, monkeypatch):
    """As an artifact gives them whose graph is another."""
    family, out = folder
    session = open_onnx(Source(family, Checkpoint(family.directory)), out, 1)
    run = session.graph.run
    monkeypatch.setattr(session.graph, "run", lambda inputs: run(inputs)[:1])
    with pytest.raises(ToolkitError, match=r"gave features \[1, .*, not \[10, "):
        session.encode_all([picture(family)])


def test_a_graph_of_other_inputs_is_one_sentence(folder, monkeypatch):
    family, out = folder
    session = open_onnx(Source(family, Checkpoint(family.directory)), out, 1)
    monkeypatch.setattr(family, "encoder_inputs", lambda group: {"patches": group[0].rows})
    with pytest.raises(ToolkitError, match="vision.onnx cannot be computed"):
        session.encode_all([picture(family)])
