"""Stand-in: aclruntime of 2023, which binds its context once and lists plain times."""

from stand_in_aclruntime import BaseTensor, Session, Tensor, session_options  # noqa: F401


class InferenceSession(Session):
    pairs = rebinds = False

    def finalize(self):
        self._destroy()
