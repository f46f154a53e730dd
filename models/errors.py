"""Errors of models: one sentence each, for the user."""


class ModelError(Exception):
    """A checkpoint, picture or prompt that cannot be used; the message is one sentence for the user."""
