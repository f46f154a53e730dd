"""What both sides of a comparison need: takes the options, raises what is missing before anything is
computed. The reference of a large model alone may take an hour."""

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.engine.options import EngineOptions
from runtime.ops import choose
from runtime.vision.om_file import check_om

from .options import CompareOptions


def check_components(options: CompareOptions, engine_options: EngineOptions, family: Family):
    """ToolkitError for a device, a package or an .om that is not here."""
    choose(engine_options.ops, engine_options.device, engine_options.kernels)
    if engine_options.vision == "om" and family.vision:
        check_om(family, Checkpoint(family.directory), engine_options.artifact)
    try:
        choose("reference", options.reference_device)
    except ToolkitError as error:
        message = str(error).replace("--device", "--reference-device")
        raise ToolkitError(message, error.exit_code) from error
