"""GLM-4-9B-chat, in the `chatglm` layout of its release and in the `-hf` layout of transformers.

Takes config.json and messages; returns decoder settings, weight table, stop ids and tokenised
prompts. GLM-4V builds on it.
"""

import functools
import json
import re

import numpy as np

from models.checkpoint.table import Weight, pair
from models.config import DecoderConfig, Rope, check_fields, head_size, rope_of
from models.errors import ModelError
from models.family import Prompt, SamplingDefaults
from models.network.rope import interleaved_order, permute_heads
from models.prompt.chat_template import ChatTemplate, directory_template, find_template
from models.prompt.messages import check_messages, check_tools, split_content
from models.prompt.special_tokens import SpecialToken, SpecialTokenEscaper
from models.prompt.streaming import TRAINING_DATE, partial_match, with_training_date
from models.prompt.tokenizers.json_file import JsonTokenizer, MissingTokenizer
from models.prompt.tokenizers.ranks import TiktokenTokenizer
from models.side_files import is_there

from .templated import TemplatedFamily
from .weight_rows import buffers, decoder_weights

SPECIAL = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
ROLES = ("system", "user", "assistant", "observation")
IMAGE_MARKS = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")
CHATGLM_ONLY = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False,
    "pre_seq_len": None,
}
NOT_RELEASED = (
    "config.json has {field} = {given}, which none of the released models has "
    "(they have {wanted!r}); take config.json from the release"
)
WITH_TOOLS = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
TOOL = "\n\n## {}\n\n{}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


# a template that reads the tools from the messages, as the release's does
READS_TOOLS_OF_MESSAGES = re.compile(r"\[['\"]tools['\"]\]|\.tools\b")


class Glm4(TemplatedFamily):
    """One wording serves every language: the model answers in the language of the question."""

    name = "glm-4"
    takes_tools = True
    stop_tokens = ("<|endoftext|>", "<|user|>", "<|observation|>")

    @classmethod
    def matches(cls, config):
        if "vision_config" in config:
            return None
        if config.get("model_type") == "glm" and config.get("attention_bias", True):
            return "config.json has model_type glm, biases on q, k and v, and no vision_config (-hf layout)"
        if is_chatglm(config):
            return "config.json has model_type chatglm, multi_query_group_num and no vision_config"

    def __init__(self, directory, config):
        super().__init__(directory, config)
        self.hf = config["model_type"] != "chatglm"
        self.decoder = self._decoder()

    def _decoder(self) -> DecoderConfig:
        return hf_decoder(self.config) if self.hf else chatglm_decoder(self.config)

    @functools.cached_property
    def tokenizer(self):
        ranks = self.directory / "tokenizer.model"
        json_file = self.directory / "tokenizer.json"
        if is_there(ranks):
            return TiktokenTokenizer(ranks, SPECIAL)
        if is_there(json_file):
            return JsonTokenizer(json_file, plain=True)
        return MissingTokenizer(json_file if self.hf else ranks)

    def text_ids(self, text, special=True):
        start = [SpecialToken("[gMASK]"), SpecialToken("<sop>")] if special else []
        ids = []
        for piece in [*start, text]:
            ids += self._ids(piece)
        return ids

    def release_sampling(self, with_image):
        return SamplingDefaults(
            max_length=min(8192, self.decoder.max_length), temperature=0.8, top_p=0.8
        )

    def clean(self, answer):
        """Without the line break that the model begins with; a tool call keeps its first line."""
        return with_training_date(answer)

    def unstable_tail(self, answer):
        return partial_match(TRAINING_DATE, answer)

    def tool_call(self, answer: str, names) -> tuple[str, str] | None:
        """(function, its arguments) if the answer calls one of `names`; None if it is text.

        A call has the name alone in its first line, then a JSON object.
        """
        name, _, arguments = answer.partition("\n")
        name = name.strip()
        arguments = arguments.lstrip()
        return (name, arguments) if name in names and arguments.startswith("{") else None

    def may_be_tool_call(self, answer: str, names) -> bool:
        """Whether the beginning of an answer may yet become a call."""
        line, _, rest = answer.partition("\n")
        if rest.strip():
            return False
        return line.strip() in names or any(name.startswith(answer) for name in names)

    # prompts

    def prompt(self, messages, language=None, tools=None) -> Prompt:
        """Chat messages -> Prompt.

        Roles: system, user, assistant, observation or tool (a tool's result). An assistant message
        may carry "metadata", the name of the tool it calls, or "tool_calls" as OpenAI has them; the
        last message, with metadata and no content, is a call that the answer completes. tools:
        OpenAI's descriptions of functions, also as "tools" of any message.
        """
        check_messages(messages)
        check_tools(tools or [])
        turns = []
        for message in messages:
            check_tools(message.get("tools") or [])
            turns += released_turns(message)
        turns, images = self._checked(turns)
        self._check_images(len(images))
        call_name = []
        if is_open_call(turns[-1]):
            call_name = [f"{turns.pop()['metadata']}\n"]
        pieces = [*self._pieces(turns, tools), *call_name]
        ids = []
        for piece in pieces:
            ids += self._ids(piece)
        pixels = [self.pixels(image) for image in images]
        return self._prompt(np.array(ids, dtype=np.int64), pixels, text="".join(pieces))

    def prepare_prompts(self):
        if find_template(self.directory):
            super().prepare_prompts()

    def _checked(self, messages) -> tuple[list[dict], list]:
        """(messages with plain text as content and "num_images" beside it, the images in order)"""
        turns = []
        images = []
        for message in messages:
            if message["role"] not in ROLES:
                raise ModelError(
                    f"{self.name} has no role {message['role']!r}; use one of {', '.join(ROLES)}"
                )
            new_images, text = self._content(message)
            images += new_images
            turn = {"metadata": "", **message, "content": text, "num_images": len(new_images)}
            turns.append(turn)
        if not turns or not may_end(turns[-1]):
            raise ModelError(
                "the conversation does not end with a user message or an observation; "
                "add a question"
            )
        return turns, images

    def _content(self, message) -> tuple[list, str]:
        return split_content(message["content"])

    def _pieces(self, messages, tools) -> list[str]:
        """The prompt in the words of the directory's template, else of the release's first code."""
        template = directory_template(self.directory, bool(tools))
        if template is None:
            return released_pieces(messages, tools)
        special = self.tokenizer.special_tokens() or SPECIAL
        return template_pieces(template, messages, tools, special)

    def _ids(self, piece) -> list[int]:
        if not isinstance(piece, SpecialToken):
            return self.tokenizer.encode(piece)
        token_id = self.tokenizer.token_id(piece)
        if token_id is None:
            raise ModelError(
                f"the tokenizer files of {self.directory} have no {piece}; copy tokenizer.model or "
                "tokenizer.json, and tokenizer_config.json, from the release"
            )
        return [token_id]

    # weights

    def weights(self) -> list[Weight]:
        if not self.hf:
            return list(chatglm_weights(self.decoder, self.config.get("add_qkv_bias", False)))
        head = "lm_head.weight"
        if self.config.get("tie_word_embeddings") and self.shapes and head not in self.shapes:
            head = None
        rows = decoder_weights(
            self.decoder,
            "model.",
            head,
            rotary_order(self.decoder),
            qkv_bias=self.config.get("attention_bias", True),
            fused_mlp=True,
        )
        return [*rows, *buffers(self.shapes)]


def released_turns(message: dict) -> list[dict]:
    """OpenAI's message as the release has it: every call a turn of its own."""
    if message["role"] == "tool":
        return [{**message, "role": "observation"}]
    if not message.get("tool_calls"):
        return [message]
    turns = []
    if message.get("content"):
        turns.append({"role": "assistant", "content": message["content"]})
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"].strip() or "{}"
        turns.append({"role": "assistant", "metadata": function["name"], "content": arguments})
    return turns


def may_end(turn: dict) -> bool:
    """Whether the model may answer after this turn."""
    return turn["role"] in ("user", "observation") or is_open_call(turn)


def is_open_call(turn: dict) -> bool:
    """A call of which only the tool's name is given."""
    return turn["role"] == "assistant" and bool(turn.get("metadata")) and not turn["content"]


def released_pieces(messages: list[dict], tools=None) -> list[str]:
    """The prompt as the release's first tokenizer code worded it.

    Header and content are pieces of their own, so that a header's line break never merges with the
    text behind it. A system turn before a message describes its tools. Empty messages are left out.
    """
    pieces = [SpecialToken("[gMASK]"), SpecialToken("<sop>")]
    for message in with_tools(messages, tools):
        if message.get("tools"):
            described = WITH_TOOLS + "".join(map(describe_tool, message["tools"]))
            pieces += [SpecialToken("<|system|>"), "\n", described]
        if message["content"] or message["num_images"]:
            role = SpecialToken(f"<|{message['role']}|>")
            marks = [SpecialToken(mark) for mark in IMAGE_MARKS * message["num_images"]]
            pieces += [role, f"{message['metadata']}\n", *marks, message["content"]]
    return [*pieces, SpecialToken("<|assistant|>")]


def template_pieces(
    template: ChatTemplate, messages: list[dict], tools=None, special=SPECIAL
) -> list[str]:
    """The rendered text, cut at the special tokens that the template itself wrote."""
    if READS_TOOLS_OF_MESSAGES.search(template.source):
        messages = with_tools(messages, tools)
        tools = None
    escaper = SpecialTokenEscaper(special)
    escaped = escaper.escape(messages)
    for message in escaped if template.takes_parts else ():
        message["content"] = [{"type": "text", "text": message["content"]}]
    return escaper.split(template.render(escaped, escaper.escape(tools)))


def with_tools(messages: list[dict], tools) -> list[dict]:
    """The messages behind an empty system message that carries the tools, if there are any."""
    if not tools:
        return messages
    carrier = {"role": "system", "content": "", "metadata": "", "num_images": 0, "tools": tools}
    return [carrier, *messages]


def describe_tool(tool: dict) -> str:
    """A function as the release's system turn words it."""
    if tool["type"] != "function":
        raise ModelError(
            f"tool of type {tool['type']!r} is not known; give functions: "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        )
    function = tool["function"]
    return TOOL.format(function["name"], json.dumps(function, ensure_ascii=False, indent=4))


def is_chatglm(config: dict) -> bool:
    """The network of ChatGLM2 and later (their predecessors have no key/value groups)."""
    return config.get("model_type") == "chatglm" and "multi_query_group_num" in config


def chatglm_decoder(config: dict) -> DecoderConfig:
    """Fields of the `chatglm` layout; defaults are those of the release's config class."""
    check_fields(config, CHATGLM_ONLY, NOT_RELEASED)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("kv_channels") or head_size(hidden, heads)
    return DecoderConfig(
        vocab_size=config["padded_vocab_size"],
        hidden=hidden,
        layers=config["num_layers"],
        heads=heads,
        kv_heads=config["multi_query_group_num"],
        head_dim=head_dim,
        ffn=config["ffn_hidden_size"],
        rope=Rope(dim=head_dim // 2, theta=10000.0 * config.get("rope_ratio", 1)),
        eps=config.get("layernorm_epsilon", 1e-5),
        max_length=config.get("seq_length", 2048),
    )


def hf_decoder(config: dict) -> DecoderConfig:
    """Fields of transformers' `glm` layout; defaults are those of its GlmConfig: GLM-4-9B's."""
    check_fields(config, {"hidden_act": "silu"}, NOT_RELEASED)
    head_dim = config.get("head_dim", 128)
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", 2),
        head_dim=head_dim,
        ffn=config["intermediate_size"],
        rope=rope_of(config, head_dim, factor=0.5),
        eps=config.get("rms_norm_eps", 1.5625e-07),
        max_length=config.get("max_position_embeddings", 131072),
    )


def chatglm_weights(d: DecoderConfig, qkv_bias: bool):
    """Table of the `chatglm` layout: qkv rows are [q; k; v] already, in adjacent rotary pairs."""
    rows = (d.heads + 2 * d.kv_heads) * d.head_dim
    fold = functools.partial(
        fold_qkv, rotated=(d.heads + d.kv_heads) * d.head_dim, order=rotary_order(d)
    )
    matrix = (d.vocab_size, d.hidden)
    yield from pair("transformer.embedding.word_embeddings", matrix, "embed", bias=False)
    yield Weight("transformer.rotary_pos_emb.inv_freq", (d.rope.dim // 2,), optional=True)
    for i in range(d.layers):
        layer = f"transformer.encoder.layers.{i}."
        ours = f"layers.{i}."
        yield from pair(
            layer + "self_attention.query_key_value", (rows, d.hidden), ours + "qkv", fold, qkv_bias
        )
        yield from pair(
            layer + "self_attention.dense",
            (d.hidden, d.heads * d.head_dim),
            ours + "out",
            bias=False,
        )
        yield from pair(layer + "mlp.dense_h_to_4h", (2 * d.ffn, d.hidden), ours + "up", bias=False)
        yield from pair(layer + "mlp.dense_4h_to_h", (d.hidden, d.ffn), ours + "down", bias=False)
        yield from pair(layer + "input_layernorm", (d.hidden,), ours + "attention_norm", bias=False)
        yield from pair(
            layer + "post_attention_layernorm", (d.hidden,), ours + "mlp_norm", bias=False
        )
    yield from pair("transformer.encoder.final_layernorm", (d.hidden,), "final_norm", bias=False)
    yield from pair("transformer.output_layer", matrix, "lm_head", bias=False)


def rotary_order(d: DecoderConfig):
    return interleaved_order(d.head_dim, d.rope.dim)


def fold_qkv(rows, rotated: int, order):
    """Rows [q; k; v]: permute the heads of the first `rotated` rows, q and k."""
    out = rows.clone()
    out[:rotated] = permute_heads(rows[:rotated], order)
    return out
