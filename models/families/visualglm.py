"""VisualGLM-6B: EVA-ViT-g, Q-Former and projection in front of ChatGLM-6B (first generation).

Takes the config of the released or of the SAT layout, and messages; returns decoder settings,
weight table, vision encoder and prompts.
"""

import functools
import math
import re

import numpy as np
import torch
from torch import nn

from models.checkpoint.table import Weight, dense, pair
from models.config import DecoderConfig, Rope, VisionSpec, head_size, patch_grid
from models.errors import ModelError
from models.family import Family, Layout, Prompt, SamplingDefaults, id_array
from models.generation_config import token_ids
from models.network.rope import two_halves_order
from models.network.vision_blocks import (
    Attention,
    Dense,
    Mlp,
    Normalize,
    PreNormBlock,
    with_class_token,
)
from models.prompt.images import CLIP_MEAN, CLIP_STD, denormalize, one_by_one, open_image
from models.prompt.messages import check_messages, said, split_content
from models.prompt.preprocessor import ImageProcessor, squashed
from models.prompt.special_tokens import special_names
from models.prompt.streaming import TRAINING_DATE, partial_match, with_training_date
from models.prompt.tokenizers.ice import IceTokenizer

from .visualglm_weights import fold_head_major_qkv, fold_sat_qkv, qformer_weights, vit_weights

LN_VISION_EPS = 1e-5  # a plain nn.LayerNorm in the release, not the tower's 1e-6


class Vit(nn.Module):
    """EVA-ViT: NHWC image [B, S, S, 3], raw 0..255 -> [B, 1 + patches, width], class token at 0."""

    def __init__(self, eva: dict):
        super().__init__()
        width = eva["hidden_size"]
        patch = eva["patch_size"]
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.empty(1, width))
        self.position = nn.Parameter(torch.empty(1 + _patches(eva), width))
        heads = eva["num_attention_heads"]
        block = (width, heads, eva["inner_hidden_size"], eva["layernorm_epsilon"])
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(eva["num_layers"]))
        self.norm = nn.LayerNorm(width, eps=LN_VISION_EPS)

    def forward(self, nhwc):
        x = self.patch(self.normalize(nhwc)).flatten(2).transpose(1, 2)
        x = with_class_token(x, self.cls) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _patches(eva: dict) -> int:
    """Patches of an image."""
    height, width = eva["image_size"][:2]
    patch = eva["patch_size"]
    return (height // patch) * (width // patch)


class QFormerLayer(nn.Module):
    """Post-norm BERT layer whose residuals are the *normalised* values; cross-attention in some."""

    def __init__(self, width, heads, inner, context_width, cross: bool, eps: float):
        super().__init__()
        self.input_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross = Attention(width, heads, context_width) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.mlp = Mlp(width, inner)

    def forward(self, h, context):
        x = self.input_norm(h)
        x = self.attention_norm(x + self.attention(x))
        if self.cross is not None:
            x = self.cross_norm(x + self.cross(x, context))
        return x + self.mlp(x)


class QFormer(nn.Module):
    """Learned queries look at the tower's tokens [B, T, context] -> [B, queries, width]."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["hidden_size"]
        eps = config["layernorm_epsilon"]
        self.queries = nn.Parameter(torch.empty(config["vocab_size"], width))
        heads = config["num_attention_heads"]
        inner = config.get("inner_hidden_size") or 4 * width
        context = config["cross_attn_hidden_size"]
        self.layers = nn.ModuleList(
            QFormerLayer(width, heads, inner, context, cross, eps) for cross in config["is_decoder"]
        )
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, context):
        h = self.queries.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            h = layer(h, context)
        return self.norm(h)


class VisionEncoder(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> feature rows [B, queries, hidden]."""

    def __init__(self, config: dict):
        super().__init__()
        self.vit = Vit(config["eva_config"])
        self.qformer = QFormer(config["qformer_config"])
        self.project = Dense(config["qformer_config"]["hidden_size"], config["hidden_size"])

    def forward(self, nhwc):
        return self.project(self.qformer(self.vit(nhwc)))


# language -> (wording of the question, wording of a past turn)
WORDING = {
    "zh": ("问：{}\n答：", "问：{}\n答：{}\n"),
    "en": ("Q:{}\nA:", "Q:{}\nA:{}\n"),
}
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")


class VisualGLM(Family):
    name = "visualglm"
    prefix_lm = True

    @classmethod
    def matches(cls, config):
        if "eva_config" in config and "qformer_config" in config:
            return "config.json has eva_config and qformer_config"
        if "eva_args" in config and "qformer_args" in config:
            return "model_config.json (SAT layout) has eva_args and qformer_args"

    def __init__(self, directory, config):
        self.sat = "eva_args" in config
        if self.sat:
            parts = {"eva_config": config["eva_args"], "qformer_config": config["qformer_args"]}
            config = config | parts
        super().__init__(directory, config)
        hidden = config["hidden_size"]
        heads = config["num_attention_heads"]
        self.decoder = DecoderConfig(
            vocab_size=config["vocab_size"],
            hidden=hidden,
            layers=config["num_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=head_size(hidden, heads),
            ffn=config.get("inner_hidden_size") or 4 * hidden,
            eps=config["layernorm_epsilon"],
            rope=Rope(dim=hidden // heads // 2, channels=2, half_rounded=True),
            max_length=config["max_sequence_length"],
            norm="layer",
            activation="gelu_tanh",
            # the release never passes num_layers to its blocks: always 28
            residual_alpha=math.sqrt(2 * 28),
        )
        eva = self.config["eva_config"]
        side = eva["image_size"][0]
        patch_grid(side, eva["patch_size"])
        rows = self.config["qformer_config"]["vocab_size"]
        self.vision = VisionSpec((1, side, side, 3), (1, rows, hidden))

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of config.json, generation_config.json and the tokenizer."""
        eos = special_names(self.directory).get("eos_token", "")
        ids = {self.tokenizer.token_id(eos)}
        ids.update(token_ids(self.config["eos_token_id"]))
        ids.update(self.generation_config.get("eos_token_id", ()))
        return tuple(sorted(ids - {None}))

    def vision_encoder(self):
        return VisionEncoder(self.config)

    @functools.cached_property
    def tokenizer(self):
        return IceTokenizer(self.directory / "ice_text.model", self.config["bos_token_id"])

    def text_ids(self, text, special=True):
        end = [self.config["gmask_token_id"], self.config["bos_token_id"]]
        return self.tokenizer.encode(text) + (end if special else [])

    def release_sampling(self, with_image):
        # the release also forces at least 100 tokens; we do not copy that: it spoils short answers
        if with_image:
            return SamplingDefaults(
                max_length=1024, temperature=0.8, top_p=0.4, top_k=100, repetition_penalty=1.2
            )
        return SamplingDefaults(max_length=2048, temperature=0.95, top_p=0.7)

    def clean(self, answer):
        """With a date for its placeholder, and full-width punctuation beside Chinese characters."""
        beside_chinese = r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])"
        answer = with_training_date(answer)
        return re.sub(beside_chinese, lambda mark: mark[0].translate(FULL_WIDTH), answer)

    def unstable_tail(self, answer):
        tail = re.match(r"[\s,!:;?]*", answer[::-1])[0]
        return max(len(tail), partial_match(TRAINING_DATE, answer))

    # images and prompt

    def pixels(self, source) -> np.ndarray:
        """One image -> float32 [1, S, S, 3], raw 0..255.

        source: path, bytes or PIL image, or the release's normalised [1, 3, S, S] array.
        """
        if isinstance(source, np.ndarray):
            return denormalize(source, CLIP_MEAN, CLIP_STD, self.vision.input_shape)
        return self.image_processor.pixels(open_image(source))

    @functools.cached_property
    def image_processor(self) -> ImageProcessor:
        """By the directory's settings, which are read with the first picture."""
        return ImageProcessor(self.directory, squashed(self.vision.input_shape[1]))

    def prompt(self, messages, language="zh", tools=None) -> Prompt:
        """Chat messages -> Prompt. The image always comes first, whichever turn brought it."""
        if tools:
            raise ModelError(f"{self.name} knows no tools; leave the tools out")
        check_messages(messages)
        if language not in WORDING:
            raise ModelError(
                f"{self.name} has no wording for language {language!r}; use {' or '.join(WORDING)}"
            )
        images, text = self._conversation(messages, WORDING[language])
        self.check_image_count(len(images))
        if not images:
            return self._finish(self.text_ids(text), [], (), text)
        before = self.tokenizer.encode("<img>")
        after = self.text_ids("</img>" + text)
        ids = before + [self.placeholder_id] * self.vision.rows + after
        pixels = [self.pixels(image) for image in images]
        return self._finish(ids, pixels, (len(before),), "<img></img>" + text)

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Token ids as the release feeds its model -> Prompt.

        ids [T] with 32 placeholders, gMASK and <sop>; pixels [n, 3, S, S], normalised, also with more axes.
        """
        ids = id_array(ids)
        images = [self.pixels(image) for image in one_by_one(pixels)]
        self.check_image_count(len(images))
        if images and image_starts is None:
            image_starts = (self._find_placeholders(ids),)
        starts = id_array(() if image_starts is None else image_starts, "image_starts")
        if len(starts) != len(images) or any(self._is_outside(start, ids) for start in starts):
            raise ModelError(
                f"image_starts is {starts.tolist()}, which does not fit {len(images)} pictures of "
                f"{self.vision.rows} rows among {len(ids)} ids"
            )
        return Prompt(ids, images, self._layout(ids, tuple(starts.tolist())))

    def _is_outside(self, start: int, ids) -> bool:
        return not 0 <= start <= len(ids) - self.vision.rows

    @property
    def placeholder_id(self):
        return self.tokenizer.piece_id("<unk>")

    def _conversation(self, messages, wording) -> tuple[list, str]:
        """(images in order, the text up to where the answer begins)"""
        images = []
        text = ""
        question = None
        for message in messages:
            new, content = split_content(said(message))
            images += new
            if message["role"] == "user" and question is None:
                question = content
            elif message["role"] == "assistant" and question is not None:
                text = text + wording[1].format(question, content)
                question = None
            else:
                raise ModelError(
                    f"{self.name} wants user and assistant messages in turn, "
                    f"got {message['role']!r}; it has no system messages"
                )
        if question is None:
            raise ModelError("the conversation does not end with a user message; add a question")
        return images, text + wording[0].format(question)

    def _finish(self, ids, pixels, starts, text):
        return Prompt(np.array(ids, dtype=np.int64), pixels, self._layout(ids, starts), text)

    def _find_placeholders(self, ids) -> int:
        rows = self.vision.rows
        for start in range(len(ids) - rows + 1):
            if len(set(ids[start : start + rows].tolist())) == 1:
                return start
        raise ModelError(
            f"the prompt has a picture but no run of {rows} equal placeholder ids; "
            "pass image_starts"
        )

    def _layout(self, ids, image_starts) -> Layout:
        """Two channels of positions: place in the prompt, and in the block that <sop> opens.

        Before <sop>: 0, 1, 2, ... and 0; from it on: the place of the mask token and 1, 2, ...
        """
        bos = self.config["bos_token_id"]
        masks = (self.config["gmask_token_id"], self.config["mask_token_id"])
        sop = _index(ids, bos)
        mask = _index(ids, masks[0])
        if mask is None:
            mask = _index(ids, masks[1])
        if sop is None or mask is None:
            raise ModelError(
                f"a {self.name} prompt needs gMASK ({masks[0]}) and <sop> ({bos}) among its ids"
            )
        place = np.arange(len(ids))
        block = np.maximum(place - sop + 1, 0)
        positions = np.stack((np.where(place < sop, place, mask), block), 1)
        return Layout(positions, (mask, len(ids) - sop + 1), (0, 1), sop, image_starts)

    # weights

    def weights(self) -> list[Weight]:
        return [*self._decoder_weights(), *self._vision_weights()]

    def _decoder_weights(self):
        d = self.decoder
        fold = fold_sat_qkv if self.sat else fold_head_major_qkv
        fold = functools.partial(fold, heads=d.heads, order=two_halves_order(d.head_dim))
        lm_head = "mixins.chatglm-final.lm_head" if self.sat else "lm_head"
        matrix = (d.vocab_size, d.hidden)
        yield from pair("transformer.word_embeddings", matrix, "embed", bias=False)
        yield from pair(lm_head, matrix, "lm_head", bias=False)
        yield from pair("transformer.final_layernorm", (d.hidden,), "final_norm")
        frequencies = (d.rope.dim // 2,)
        if self.sat:
            yield Weight("mixins.chatglm-attn.rotary_emb.inv_freq", frequencies, optional=True)
        for i in range(d.layers):
            layer = f"transformer.layers.{i}."
            ours = f"layers.{i}."
            yield from pair(layer + "input_layernorm", (d.hidden,), ours + "attention_norm")
            qkv = layer + "attention.query_key_value"
            yield from pair(qkv, (3 * d.hidden, d.hidden), ours + "qkv", fold)
            yield from pair(layer + "attention.dense", (d.hidden, d.hidden), ours + "out")
            yield from pair(layer + "post_attention_layernorm", (d.hidden,), ours + "mlp_norm")
            yield from pair(layer + "mlp.dense_h_to_4h", (d.ffn, d.hidden), ours + "up")
            yield from pair(layer + "mlp.dense_4h_to_h", (d.hidden, d.ffn), ours + "down")
            if not self.sat:
                yield Weight(layer + "attention.rotary_emb.inv_freq", frequencies, optional=True)

    def _vision_weights(self):
        root = "mixins.eva.model." if self.sat else "image_encoder."
        qformer = self.config["qformer_config"]
        _, rows, hidden = self.vision.output_shape
        yield from vit_weights(
            root + "vit.", self.config["eva_config"], _patches(self.config["eva_config"])
        )
        yield from qformer_weights(root + "qformer.transformer.", qformer, rows)
        yield from dense(root + "glm_proj", hidden, qformer["hidden_size"], "vision.project")


def _index(ids, token_id) -> int | None:
    """Where the token first stands; None if it does not."""
    found = np.flatnonzero(np.asarray(ids) == token_id)
    return int(found[0]) if len(found) else None
