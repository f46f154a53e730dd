"""Base of the families whose prompt is the chat template of the model directory.

Takes messages, or ids as the original implementation feeds its model; returns a Prompt with
positions 0, 1, 2, ... whose ids hold one placeholder per image row.
"""

import functools

import numpy as np

from models.checkpoint.weight_files import stored_shapes
from models.errors import ModelError
from models.family import Family, Layout, Prompt, id_array
from models.generation_config import token_ids
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.images import denormalize, one_by_one, open_image
from models.prompt.messages import check_messages, joined_text, parse_messages, with_plain_text
from models.prompt.preprocessor import ImageProcessor, Release
from models.prompt.special_tokens import SpecialTokenEscaper, broken_up, special_names
from models.prompt.templates.client import PROCESS_OF_TEMPLATES


class TemplatedFamily(Family):
    """To fill in beside what Family asks for: `default_template` and `stop_tokens`.

    A family with images also needs `placeholder` and `pictures`.
    """

    # for a directory that has no template; may use `rows`, the rows of an image
    default_template: str
    # token and id that stand for one image row; None: a text model
    placeholder: tuple[str, int] | None = None
    # end an answer, beside the ids that the directory's files name
    stop_tokens: tuple[str, ...] = ()
    # what the release does with a picture where the directory's settings do not say
    pictures: Release
    upright = True  # pictures are turned as the camera's EXIF tag says

    def prepare_prompts(self):
        PROCESS_OF_TEMPLATES.start()

    def prompt(self, messages, language=None, tools=None) -> Prompt:
        """Chat messages -> Prompt.

        Roles: system, user, assistant; images keep their place among the parts. The wording is the
        template's, whatever the language. ModelError names what the template cannot express.
        """
        check_messages(messages)
        turns, images = parse_messages(messages)
        self._check_images(len(images))
        pieces = self._pieces_of(turns, tools)
        ids = np.array(self.tokenizer.encode_pieces(pieces), dtype=np.int64)
        pixels = [self.pixels(image) for image in images]
        return self._prompt(self._expand(ids, pixels), pixels, None, "".join(pieces))

    def _pieces_of(self, turns: list[dict], tools) -> list[str]:
        """The rendered text, cut at the special tokens that the template itself wrote."""
        mark = self.placeholder[:1] if self.placeholder else ()
        escaper = SpecialTokenEscaper(dict.fromkeys((*self.tokenizer.special_tokens(), *mark)))
        turns = escaper.escape(turns)
        template = self.template(bool(tools))
        shown = turns if template.takes_parts else with_plain_text(turns, self.image_mark())
        text = template.render(shown, escaper.escape(tools), rows=self.rows_of_image())
        self._check_system_shown(turns, text)
        pieces = escaper.split(text)
        return broken_up(pieces, self.placeholder[0]) if self.placeholder else pieces

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Token ids as the original implementation feeds its model -> Prompt.

        ids [T] have a placeholder for every image row. pixels: normalised [n, 3, S, S], also with
        more axes in front. image_starts None: the images take the placeholders in order.
        """
        ids = id_array(ids)
        images = one_by_one(pixels)
        self._check_images(len(images))
        return self._prompt(ids, [self.pixels(image) for image in images], image_starts)

    def pixels(self, source) -> np.ndarray:
        """One image -> float32 [1, S, S, 3], raw 0..255.

        source: path, bytes, PIL image, the release's normalised [1, 3, S, S], or the result itself.
        """
        if not isinstance(source, np.ndarray):
            return self.image_processor.pixels(open_image(source, self.upright))
        if source.shape == self.vision.input_shape:
            return source.astype(np.float32)
        return denormalize(source, self.pictures.mean, self.pictures.std, self.vision.input_shape)

    @functools.cached_property
    def image_processor(self) -> ImageProcessor:
        """By the directory's settings, which are read with the first picture."""
        return ImageProcessor(self.directory, self.pictures)

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
        """Ids that end an answer: of generation_config.json, config.json, the tokenizer's eos_token
        and `stop_tokens`."""
        eos = special_names(self.directory).get("eos_token", "")
        ids = {self.tokenizer.token_id(token) for token in (*self.stop_tokens, eos)}
        ids.update(self.generation_config.get("eos_token_id", ()))
        ids.update(token_ids(self._config_eos()))
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
            starts = id_array(given, "image_starts")
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
