"""What the commands that run a model share: their rank under torchrun, checked images, an open engine."""

from runtime.common.errors import ToolkitError

from .options import EngineOptions


def join_torchrun(options: EngineOptions):
    """Under torchrun only rank 0 returns; the other ranks follow it until it ends. Without torchrun nothing happens."""
    from runtime.parallel import team

    team.join_torchrun(options.tensor_parallel_size, open_engine)


def open_engine(model, options: EngineOptions):
    """The Engine of a model folder; torch is imported here and not before."""
    from .engine import Engine

    return Engine.from_options(model, options)


def check_pictures(family, pictures):
    """Raises, before a model is loaded, for a text-only family, too many pictures, or a file that is not a picture."""
    if pictures and family.vision is None:
        raise ToolkitError(
            f"{family.name} is a text model and takes no picture; leave out --image {pictures[0]}"
        )
    if pictures:
        family.check_image_count(len(pictures))
    for picture in pictures:
        family.pixels(picture)
