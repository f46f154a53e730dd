"""Stand-in: aclruntime of 2026, with the names spelled both ways."""

from stand_in_aclruntime import BaseTensor, Session, Tensor, session_options  # noqa: F401


class InferenceSession(Session):
    summary = Session.sumary
    reset_summaryinfo = Session.reset_sumaryinfo
    reset_sumaryinfo = None

    free_resource = Session._free_resource
