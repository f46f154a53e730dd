"""Stand-in: aclruntime 0.0.2 of 2024."""

from stand_in_aclruntime import BaseTensor, Session, Tensor, session_options  # noqa: F401


class InferenceSession(Session):
    free_resource = Session._free_resource

    @staticmethod
    def finalize():
        pass
