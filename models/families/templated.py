"""Families whose prompt is the chat template of the model directory and whose ids hold one placeholder per picture row.

Messages (or ids as the original implementation feeds its model) flow in, a Prompt with plain positions 0, 1, 2, ...
flows out.
"""

import functools

import numpy as np

from models.checkpoint.shards import stored_shapes
from models.errors import ModelError
from models.family import Family, Layout, Prompt
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.messages import said, with_parts, with_text


class TemplatedFamily(Family):
    """To fill in beside what Family asks for: `default_template`, `placeholder`, `stop_tokens`, `normalised_pixels`."""

    default_template: str  # for a directory that has none; may use `rows`, the rows of a picture
    placeholder: tuple[str, int] | None = (
        None  # token and id that stand for one picture row; None: a text model
    )
    stop_tokens: tuple[
        str, ...
    ] = ()  # end an answer beside the ids that the directory's files name

    def prompt(self, messages, language=None, tools=None) -> Prompt:
        """Chat messages -> Prompt. Roles system, user, assistant; pictures keep their place among the parts.

        The wording is the template's, whatever the language. ModelError names what the template cannot express.
        """
        turns, pictures = with_parts(messages)
        self._accepts(len(pictures))
        text = self.template(bool(tools)).render(
            turns if self.vision else with_text(turns),
            tools,
            rows=self.vision.rows if self.vision else 0,
        )
        self._shows_system(turns, text)
        return self._prompt(
            self._expand(np.array(self.tokenizer.encode(text), dtype=np.int64)),
            [self.pixels(picture) for picture in pictures],
            None,
            text,
        )

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """ids [T] with a placeholder for every picture row; pixels normalised [n, 3, S, S] (more axes in front are
        taken too); image_starts None: the pictures are the placeholder's places, in order."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        pictures = [] if pixels is None else np.asarray(pixels)
        pictures = [] if len(pictures) == 0 else pictures.reshape(-1, *pictures.shape[-3:])
        self._accepts(len(pictures))
        return self._prompt(ids, [self.pixels(picture[None]) for picture in pictures], image_starts)

    def pixels(self, source) -> np.ndarray:
        """Picture (path, bytes or PIL image; upright as its camera says), the release's normalised [1, 3, S, S], or the
        result itself -> float32 [1, S, S, 3], raw 0..255."""
        raise NotImplementedError

    def template(self, tools: bool = False) -> ChatTemplate:
        return directory_template(self.directory, tools) or ChatTemplate(self.default_template)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the directory's tensors; {} where there are no weights (yet)."""
        return stored_shapes(self.directory)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, whoever names it: the directory's generation_config.json, its config, or we."""
        given = [self._generation_config().get("eos_token_id"), self._config_eos()]
        ids = {i for g in given if g is not None for i in (g if isinstance(g, list) else [g])}
        return tuple(
            sorted(ids | {self.tokenizer.token_id(token) for token in self.stop_tokens} - {None})
        )

    def _config_eos(self):
        return self.config.get("eos_token_id")

    def _accepts(self, pictures: int):
        if pictures and not self.vision:
            raise ModelError(
                f"{self.name} is a text model and takes no picture; leave the picture out"
            )
        self.check_image_count(pictures)

    def _shows_system(self, turns, text):
        for turn in turns:
            if turn["role"] == "system" and said(turn).strip() not in text:
                raise ModelError(
                    f"the chat template of {self.name} has no system messages; "
                    "put the instruction into the first question"
                )

    def _expand(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the rendered text -> ids with a placeholder for every picture row."""
        return ids

    def _prompt(self, ids, pixels, image_starts=None, text="") -> Prompt:
        starts = self._picture_starts(ids, len(pixels), image_starts) if self.vision else ()
        return Prompt(
            ids,
            pixels,
            Layout(np.arange(len(ids))[:, None], (len(ids),), (1,), image_starts=starts),
            text,
        )

    def _picture_starts(self, ids, pictures: int, given) -> tuple[int, ...]:
        """First row of each picture. Every row must stand on a placeholder, and every placeholder must get a row."""
        (token, token_id), rows = self.placeholder, self.vision.rows
        places = np.flatnonzero(ids == token_id)
        starts = places[::rows] if given is None else np.asarray(given, dtype=np.int64).reshape(-1)
        filled = (starts[:, None] + np.arange(rows)).reshape(-1)
        if len(places) != pictures * rows:
            raise ModelError(
                f"the number of pictures ({pictures}, {rows} rows each) does not fit the prompt: it has "
                f"{len(places)} {token} tokens and needs {pictures * rows}; give one picture per mark"
            )
        if not np.array_equal(np.sort(filled), places):
            raise ModelError(
                f"the {token} tokens of a picture must be {rows} in a row; "
                "build the prompt with Engine.prompt"
            )
        return tuple(starts.tolist())
