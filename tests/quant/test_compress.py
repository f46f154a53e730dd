"""`python -m quant compress`: msmodelslim's real Compressor around a stand-in for the program that
CANN builds."""

import json
import re
import shutil
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from quant.__main__ import main
from quant.rank_shares import Shares
from quant.validate.findings import MINDIE
from quant.validate.folder import validate
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.parallel.split import Split

pytestmark = pytest.mark.skipif(
    find_spec("msmodelslim") is None, reason="needs msmodelslim: pip install 'ascend-vlm[quant]'"
)

GOLDEN = paths.GOLDEN
SPARSE = GOLDEN / "msmodelslim" / "glm_f16_w8a8s"
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def two_ranks(stand_in, tmp_path_factory):
    """(folder, what its ranks hold)"""
    out = tmp_path_factory.mktemp("compressed") / "out"
    return out, compress(out, 2)


def compress(out, size, model=SPARSE):
    assert main(["compress", "--model", str(model), "--out", str(out), "-tp", str(size)]) == 0
    return [
        load_file(out / f"part{rank}-of-{size}" / "quant_model_weight_w8a8sc.safetensors")
        for rank in range(size)
    ]


def decompressed(part, layer):
    """The stand-in's bytes, back from the NPU's tiles of 16 x 32."""
    k, n = part[layer + ".info"][2:4].tolist()
    tiles = np.frombuffer(zlib.decompress(part[layer + ".weight"].numpy().tobytes()), np.int8)
    return torch.from_numpy(
        tiles.reshape(k // 32, n // 16, 16, 32).transpose(1, 2, 0, 3).reshape(n, k).copy()
    )


def halves(tensor, rank, blocks=1):
    """Rows of one of two ranks; `blocks` that are split each, as gate and up."""
    return torch.cat([block.chunk(2)[rank] for block in tensor.chunk(blocks)])


def test_shares_of_two_ranks(two_ranks):
    whole = load_file(next(SPARSE.glob("*.safetensors")))
    for rank, part in enumerate(two_ranks[1]):
        for name, blocks in (
            ("self_attn.q_proj", 1),
            ("self_attn.k_proj", 1),
            ("self_attn.v_proj", 1),
            ("mlp.gate_up_proj", 2),
        ):
            assert torch.equal(
                decompressed(part, LAYER + name),
                halves(whole[f"{LAYER}{name}.weight"], rank, blocks),
            )
            for tensor in ("deq_scale", "quant_bias"):
                assert torch.equal(
                    part[f"{LAYER}{name}.{tensor}"],
                    halves(whole[f"{LAYER}{name}.{tensor}"], rank, blocks),
                )
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(
                decompressed(part, LAYER + name), whole[f"{LAYER}{name}.weight"].chunk(2, 1)[rank]
            )
            bias = whole[f"{LAYER}{name}.quant_bias"]
            assert torch.equal(
                part[f"{LAYER}{name}.quant_bias"], torch.zeros_like(bias) if rank else bias
            )
            assert torch.equal(
                part[f"{LAYER}{name}.input_scale"], whole[f"{LAYER}{name}.input_scale"]
            )
        assert torch.equal(part["lm_head.weight"], halves(whole["lm_head.weight"], rank))
        assert torch.equal(part["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_same_as_msmodelslim_exports(stand_in, tmp_path):
    """One rank: tensors and description of Compressor.export_safetensors."""
    from msmodelslim.pytorch.weight_compression import CompressConfig, Compressor

    (ours,) = compress(tmp_path / "out", 1)
    description = json.loads((SPARSE / "quant_model_description.json").read_text())
    whole = {name: t.clone() for name, t in load_file(next(SPARSE.glob("*.safetensors"))).items()}
    (tmp_path / "detail").mkdir()
    compressor = Compressor(
        CompressConfig(record_detail_root=str(tmp_path / "detail")),
        weight=whole,
        quant_model_description=description,
    )
    compressor.run()
    compressor.export_safetensors(str(tmp_path / "theirs"))
    theirs = load_file(tmp_path / "theirs" / "quant_model_weight_w8a8sc.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    kinds = [
        json.loads((folder / "quant_model_description.json").read_text())
        for folder in (tmp_path / "out" / "part0-of-1", tmp_path / "theirs")
    ]
    assert {n: k for n, k in kinds[0].items() if n in ours} == {
        n: k for n, k in kinds[1].items() if n in theirs
    }
    assert kinds[0]["model_quant_type"] == kinds[1]["model_quant_type"] == "W8A8SC"


def test_folder_is_complete_and_valid(two_ranks):
    out, _ = two_ranks
    config = json.loads((out / "config.json").read_text())
    assert (config["quantize"], config["torch_dtype"]) == ("w8a8sc", "float16")
    assert (out / "tokenizer.json").read_bytes() == (SPARSE / "tokenizer.json").read_bytes()
    assert not (out / ".partial").exists() and not (out / "quant_model_description.json").exists()
    assert validate(out).loads(MINDIE) and not validate(out).problems
    assert main(["validate", str(out)]) == 0


def test_again_with_more_ranks(two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path, dirs_exist_ok=True)
    compress(tmp_path, 4)
    assert {f.name for f in tmp_path.glob("part*")} == {f"part{rank}-of-4" for rank in range(4)}


@pytest.mark.parametrize("family", ["visualglm", "glm4", "glm4v", "glm_edge_v", "llava"])
def test_ranks_share_every_row_and_column(family):
    """Fused and interleaved layouts: every row of a split tensor is on one rank, or a shared
    key/value head's on several."""
    family = family_of(GOLDEN / family)
    shares = [Shares(family, Split(family.decoder, 2, rank)) for rank in range(2)]
    split = 0
    for row in (row for row in family.weights() if row.parts):
        held = [share.of(row.source) for share in shares]
        if held[0].rows is not None:
            assert torch.equal(
                torch.cat([h.rows for h in held]).unique(), torch.arange(row.shape[0])
            ), row.source
            assert len(held[0].rows) == len(held[1].rows) < row.shape[0]
            split += 1
        elif held[0].columns is not None:
            assert [h.columns for h in held] == [
                slice(0, row.shape[1] // 2),
                slice(row.shape[1] // 2, row.shape[1]),
            ]
            split += 1
    assert split >= 4 * family.decoder.layers


# damage and mistakes


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda out: shutil.rmtree(out / "part1-of-2"), "does not hold part0-of-2 to part1-of-2"),
        (
            lambda out: (out / "part1-of-2" / "quant_model_description.json").unlink(),
            "has no quant_model_description",
        ),
        (
            lambda out: edit(out, lambda t: t.pop("lm_head.weight")),
            "lm_head.weight is missing|described but not stored",
        ),
        (
            lambda out: edit(
                out, lambda t: t[f"{LAYER}mlp.down_proj.info"].add_(torch.tensor([0, 0, 32, 0, 0]))
            ),
            "info is of a weight",
        ),
        (
            lambda out: edit(
                out, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].clone()})
            ),
            "lm_head.weight is",
        ),
    ],
)
def test_damaged_parts(damage, message, two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    problems = validate(tmp_path).problems
    assert any(re.search(message, text) for text in problems), problems


def edit(out, change):
    file = out / "part1-of-2" / "quant_model_weight_w8a8sc.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_without_the_program(tmp_path, monkeypatch):
    from msmodelslim.pytorch.weight_compression import compress_utils

    monkeypatch.setattr(compress_utils, "__file__", str(tmp_path / "compress_utils.py"))
    with pytest.raises(
        ToolkitError,
        match="compress_excutor is not there: on the machine with the 310P.* run `bash "
        ".*build.sh \\$ASCEND_HOME_PATH`",
    ) as caught:
        main(["compress", "--model", str(SPARSE), "--out", str(tmp_path / "out")])
    assert caught.value.exit_code == MISSING_COMPONENT and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how, message",
    [("broken", "compressor failed \\(.*GE initialize failed"), ("silent", "failed")],
)
def test_program_that_fails(how, message, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_COMPRESSOR", how)
    with pytest.raises(ToolkitError, match=message) as caught:
        compress(tmp_path / "out", 2)
    assert (
        caught.value.exit_code == CHECK_FAILED and not (tmp_path / "out" / "config.json").exists()
    )


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("msmodelslim/glm_f16_w8a8", [], "is W8A8, not W8A8S; make that with"),
        ("glm4", [], "is float, not W8A8S"),
        (
            "msmodelslim/glm_f16_w8a8s",
            ["-tp", "3"],
            "--tensor-parallel-size is 3: use 1, 2, 4 or 8",
        ),
        ("nowhere", [], "does not exist"),
    ],
)
def test_mistakes(model, arguments, message, stand_in, tmp_path):
    with pytest.raises(ToolkitError, match=message):
        main(
            ["compress", "--model", str(GOLDEN / model), "--out", str(tmp_path / "out"), *arguments]
        )


def test_bfloat16(stand_in, tmp_path):
    model = Path(shutil.copytree(SPARSE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToolkitError, match="is bfloat16, and the 310P computes float16 only"):
        compress(tmp_path / "out", 1, model)


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "quant", "compress", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--tensor-parallel-size" in done.stdout
