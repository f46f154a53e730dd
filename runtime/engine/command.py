"""What the commands that run a model share: takes their options, returns an open engine.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from runtime.common.errors import ToolkitError

from .options import EngineOptions


def join_torchrun(options: EngineOptions):
    """Under torchrun only rank 0 returns; the other ranks follow it until it ends. Without torchrun
    nothing happens."""
    from runtime.parallel import team

    team.join_torchrun(options.tensor_parallel_size, _open_rank)


def _open_rank(model: str, options: dict):
    """This rank's part of the Engine that rank 0 opens."""
    from .engine import Engine

    return Engine.of_rank(model, options)


def open_engine(model, options: EngineOptions):
    """The Engine of a model folder; torch is imported here and not before."""
    from .engine import Engine

    return Engine.from_options(model, options)


def check_images(family, images):
    """Raises, before a model is loaded, for a text-only family, too many images, or a file that is
    no image."""
    if images and family.vision is None:
        raise ToolkitError(
            f"{family.name} is a text model and takes no picture; leave out --image {images[0]}"
        )
    if images:
        family.check_image_count(len(images))
    for image in images:
        family.pixels(image)
