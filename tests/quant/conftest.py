"""What several tests of the quantisation need."""

import sys

import paths
import pytest

from quant.msmodelslim_calls import import_msmodelslim


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The stand-in where msmodelslim looks for its own build."""
    import_msmodelslim()
    from msmodelslim.pytorch.weight_compression import compress_utils

    home = tmp_path_factory.mktemp("slim")
    program = home / "compress_graph" / "build" / "compress_excutor"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -IS {paths.TESTS / "helpers" / "stand_in_compressor.py"} "$@"\n'
    )
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_utils, "__file__", str(home / "compress_utils.py"))
        yield program
