"""Features of images: takes prompts, returns what the vision session encodes, each image once."""

import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

IMAGES_KEPT = 16  # whose features are remembered


class ImageFeatures:
    """open_session() -> VisionSession; called with the first image."""

    def __init__(self, open_session):
        self._open_session = open_session
        self._session = None
        self.seconds = 0.0  # of encoding so far; opening the session does not count
        self._remembered = OrderedDict()  # digest of an image -> its features

    def of(self, prompt) -> list[np.ndarray]:
        """float32 [rows, hidden] of each image of a prompt; those not seen before are encoded in
        one call."""
        new = {
            digest: pixels
            for digest, pixels in zip(prompt.image_digests, prompt.pixels)
            if digest not in self._remembered
        }
        if new:
            session = self.session()
            start = time.perf_counter()
            encoded = session.encode_all(list(new.values()))
            self.seconds += time.perf_counter() - start
            self._remembered.update(zip(new, encoded))
        features = [self._remembered[digest] for digest in prompt.image_digests]
        while len(self._remembered) > IMAGES_KEPT:
            self._remembered.popitem(last=False)
        return features

    def timed(self, prompt) -> tuple[list[np.ndarray], float]:
        """`of`, and the seconds that it took; opening the session does not count."""
        self.session()
        start = time.perf_counter()
        return self.of(prompt), time.perf_counter() - start

    def session(self):
        if self._session is None:
            self._session = self._open_session()
        return self._session

    def describe(self) -> list[str]:
        """One line about what encodes, once that is known."""
        return [self._session.describe()] if self._session else []

    def unverified(self) -> Path | None:
        """The artifact or .om that encodes and was never compared with torch."""
        return self._session.unverified if self._session else None

    def close(self):
        if self._session:
            self._session.close()
