"""A fixture that opens a golden model in every combination of operators and vision backend."""

import pytest

from runtime import Engine

COMBINATIONS = (("reference", "torch"), ("cpu", "torch"), ("cpu", "onnx"))


def golden_engine(model, combinations=COMBINATIONS):
    """The fixture; assign it to its name in the test's module. All its engines share one cache of exports."""

    @pytest.fixture(scope="module", params=combinations, ids="-".join)
    def opened(request, tmp_path_factory):
        ops, vision = request.param
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
            yield Engine(model, dtype="float32", ops=ops, vision=vision)

    return opened
