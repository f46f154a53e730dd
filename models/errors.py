"""The errors that a user can act on: each is one sentence."""


class UserError(Exception):
    """Base of ModelError and ToolkitError: one sentence for the user, and the exit code of a
    command that it ends."""

    exit_code = 2  # a user mistake


class ModelError(UserError):
    """A checkpoint, image or prompt that cannot be used."""
