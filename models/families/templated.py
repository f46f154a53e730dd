"""Base of the families whose prompt is the chat template of the model directory.

Takes messages, or ids as the original implementation feeds its model; returns a Prompt with
positions 0, 1, 2, ... whose ids hold one placeholder per image row.
"""

import functools

import numpy as np

from models.checkpoint.weight_files import stored_shapes
from models.errors import ModelError
from models.family import Family, Layout, Prompt
from models.generation_config import token_ids
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.images import denormalize, one_by_one
from models.prompt.messages import joined_text, parse_messages, with_plain_text
from models.prompt.templates.client import PROCESS_OF_TEMPLATES


class TemplatedFamily(Family):
    """To fill in beside what Family asks for: `default_template` and `stop_tokens`.

    A family with images also needs `placeholder`, `normalisation` and `fit`.
    """

    # for a directory that has no template; may use `rows`, the rows of an image
    default_template: str
    # token and id that stand for one image row; None: a text model
    placeholder: tuple[str, int] | None = None
    # end an answer, beside the ids that the directory's files name
    stop_tokens: tuple[str, ...] = ()
    # mean and standard deviation per channel that the release's preprocessor applies
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]

    def prepare_prompts(self):
        PROCESS_OF_TEMPLATES.start()

    def prompt(self, messages, language=None, tools=None) -> Prompt:
        """Chat messages -> Prompt.

        Roles: system, user, assistant; images keep their place among the parts. The wording is the
        template's, whatever the language. ModelError names what the template cannot express.
        """
        turns, images = parse_messages(messages)
        self._check_images(len(images))
        template = self.template(bool(tools))
        shown = turns if template.takes_parts else with_plain_text(turns, self.image_mark())
        text = template.render(shown, tools, rows=self.rows_of_image())
        self._check_system_shown(turns, text)
        ids = np.array(self.tokenizer.encode(text), dtype=np.int64)
        pixels = [self.pixels(image) for image in images]
        return self._prompt(self._expand(ids, pixels), pixels, None, text)

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Token ids as the original implementation feeds its model -> Prompt.

        ids [T] have a placeholder for every image row. pixels: normalised [n, 3, S, S], also with
        more axes in front. image_starts None: the images take the placeholders in order.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        images = one_by_one(pixels)
        self._check_images(len(images))
        return self._prompt(ids, [self.pixels(image) for image in images], image_starts)

    def pixels(self, source) -> np.ndarray:
        """One image -> float32 [1, S, S, 3], raw 0..255.

        source: path, bytes, PIL image, the release's normalised [1, 3, S, S], or the result itself.
        """
        if not isinstance(source, np.ndarray):
            return self.fit(source, self.vision.input_shape[1])
        if source.shape == self.vision.input_shape:
            return source.astype(np.float32)
        return denormalize(source, *self.normalisation, self.vision.input_shape)

    def fit(self, source, side: int) -> np.ndarray:
        """Path, bytes or PIL image -> float32 [1, side, side, 3], fitted as the release does it."""
        raise NotImplementedError

    def rows_of_image(self) -> int:
        """Rows of every image; 0 without images."""
        return self.vision.rows if self.vision else 0

    def image_mark(self) -> str:
        """What stands for an image in a template whose content is a string: its placeholders."""
        return self.placeholder[0] * self.rows_of_image() if self.vision else ""

    def template(self, tools: bool = False) -> ChatTemplate:
        return directory_template(self.directory, tools) or ChatTemplate(self.default_template)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the directory's tensors; {} where there are no weights (yet)."""
        return stored_shapes(self.directory)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of generation_config.json, config.json and `stop_tokens`."""
        ids = {self.tokenizer.token_id(token) for token in self.stop_tokens}
        ids.update(self.generation_config.get("eos_token_id", ()))
        ids.update(token_ids(self.directory / "config.json", "eos_token_id", self._config_eos()))
        return tuple(sorted(ids - {None}))

    def _config_eos(self):
        return self.config.get("eos_token_id")

    def _check_images(self, count: int):
        if count and not self.vision:
            raise ModelError(
                f"{self.name} is a text model and takes no picture; leave the picture out"
            )
        self.check_image_count(count)

    def _check_system_shown(self, turns: list[dict], text: str):
        """ModelError if the rendered text lacks a system message."""
        for turn in turns:
            if turn["role"] == "system" and joined_text(turn["content"]).strip() not in text:
                raise ModelError(
                    f"the chat template of {self.name} has no system messages; "
                    "put the instruction into the first question"
                )

    def _expand(self, ids: np.ndarray, pixels: list) -> np.ndarray:
        """Ids of the rendered text -> ids with a placeholder for every row of these images."""
        return ids

    def _prompt(self, ids, pixels, image_starts=None, text="") -> Prompt:
        starts = self._image_starts(ids, len(pixels), image_starts) if self.vision else ()
        positions = np.arange(len(ids))[:, None]
        layout = Layout(positions, (len(ids),), (1,), image_starts=starts)
        return Prompt(ids, pixels, layout, text)

    def _image_starts(self, ids, images: int, given) -> tuple[int, ...]:
        """First row of each image; ModelError unless placeholders and image rows are the same."""
        token, token_id = self.placeholder
        rows = self.vision.rows
        places = np.flatnonzero(ids == token_id)
        starts = places[::rows]
        if given is not None:
            starts = np.asarray(given, dtype=np.int64).reshape(-1)
        filled = (starts[:, None] + np.arange(rows)).reshape(-1)
        if len(places) != images * rows:
            raise ModelError(
                f"the number of pictures ({images}, {rows} rows each) does not fit the prompt: it has "
                f"{len(places)} {token} tokens and needs {images * rows}; give one picture per mark"
            )
        if not np.array_equal(np.sort(filled), places):
            raise ModelError(
                f"the {token} tokens of a picture must be {rows} in a row; "
                "build the prompt with Engine.prompt"
            )
        return tuple(starts.tolist())
