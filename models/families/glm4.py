"""GLM-4-9B-chat, in the `chatglm` layout of its release and in the `-hf` layout of transformers. GLM-4V builds on it.

config.json and messages flow in; decoder settings, weight table, stop ids and tokenised prompts flow out.
"""

import functools
import json
import re

import numpy as np

from models.checkpoint.table import Part, Weight, pair
from models.config import DecoderConfig, Rope, rope_of
from models.errors import ModelError
from models.family import Prompt, SamplingDefaults
from models.network.rope import interleaved_order, permute_heads
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.messages import split_content
from models.prompt.streaming import partial_match
from models.prompt.tokenizers import JsonTokenizer, MissingTokenizer, TiktokenTokenizer

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
ANY_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
HIDDEN = re.compile(
    "\ue000[\ue000-\ue00d]"
)  # a special-looking piece of a message while a template renders it
ROLES = ("system", "user", "assistant", "observation")
PICTURE = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")
CHATGLM_ONLY = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False,
    "pre_seq_len": None,
}
WITH_TOOLS = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
TOOL = "\n\n## {}\n\n{}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


TRAINED = "[[训练时间]]"  # the model's own placeholder for its date


class Special(str):
    """A piece of a prompt that is one token of the vocabulary; other pieces are plain text, whatever they look like."""


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
        self.hf = config["model_type"] == "glm"
        self.decoder = hf_decoder(config) if self.hf else chatglm_decoder(config)

    @functools.cached_property
    def tokenizer(self):
        ranks = self.directory / "tokenizer.model"
        json_file = self.directory / "tokenizer.json"
        if ranks.is_file():
            return TiktokenTokenizer(ranks, SPECIAL)
        if json_file.is_file():
            return JsonTokenizer(json_file, plain=True)
        return MissingTokenizer(json_file if self.hf else ranks)

    def release_sampling(self, with_picture):
        return SamplingDefaults(
            max_length=min(8192, self.decoder.max_length), temperature=0.8, top_p=0.8
        )

    def clean(self, answer):
        """Without the line break the model begins with. A tool call keeps the tool's name, its first line."""
        return answer.strip().replace(TRAINED, "2023年")

    def unstable_tail(self, answer):
        return partial_match(TRAINED, answer)

    def called(self, answer: str, names) -> tuple[str, str] | None:
        """(function, its arguments) where an answer is a call: one of `names` alone in the first line, then a JSON object."""
        name, _, arguments = answer.partition("\n")
        name = name.strip()
        arguments = arguments.lstrip()
        return (name, arguments) if name in names and arguments.startswith("{") else None

    def may_call(self, answer: str, names) -> bool:
        """Whether the beginning of an answer may yet become a call."""
        line, _, rest = answer.partition("\n")
        return not rest.strip() and (
            line.strip() in names or any(name.startswith(answer) for name in names)
        )

    # prompts

    def prompt(self, messages, language=None, tools=None) -> Prompt:
        """Chat messages -> Prompt.

        Roles: system, user, assistant, observation or tool (a tool's result). An assistant message may carry "metadata",
        the name of the tool it calls, or "tool_calls" as OpenAI has them; with metadata and no content, as the last, it is
        a call that the answer goes on with. tools: OpenAI's descriptions of functions, also as "tools" of any message.
        """
        messages, pictures = self._checked(
            [turn for message in messages for turn in released_turns(message)]
        )
        self._accepts(len(pictures))
        begun_call = [f"{messages.pop()['metadata']}\n"] if is_begun_call(messages[-1]) else []
        pieces = [*self._pieces(messages, tools), *begun_call]
        ids = np.array([i for piece in pieces for i in self._ids(piece)], dtype=np.int64)
        return self._prompt(ids, [self.pixels(p) for p in pictures], text="".join(pieces))

    def _checked(self, messages) -> tuple[list[dict], list]:
        """Messages with plain text as content and "pictures", their number, beside it; and the pictures."""
        turns = []
        pictures = []
        for message in messages:
            if message["role"] not in ROLES:
                raise ModelError(
                    f"{self.name} has no role {message['role']!r}; use one of {', '.join(ROLES)}"
                )
            new, text = self._content(message)
            turns.append({"metadata": "", **message, "content": text, "pictures": len(new)})
            pictures += new
        if not turns or not (
            turns[-1]["role"] in ("user", "observation") or is_begun_call(turns[-1])
        ):
            raise ModelError(
                "the conversation does not end with a user message or an observation; add a question"
            )
        return turns, pictures

    def _content(self, message) -> tuple[list, str]:
        return split_content(message["content"])

    def _pieces(self, messages, tools) -> list[str]:
        """The prompt as the directory's template words it, or as the release's first tokenizer code did."""
        template = directory_template(self.directory, bool(tools))
        return (
            template_pieces(template, messages, tools)
            if template
            else released_pieces(messages, tools)
        )

    def _ids(self, piece) -> list[int]:
        if not isinstance(piece, Special):
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
        tied = (
            self.config.get("tie_word_embeddings")
            and self.shapes
            and "lm_head.weight" not in self.shapes
        )
        rows = decoder_weights(
            self.decoder,
            "model.",
            None if tied else "lm_head.weight",
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
    calls = [call["function"] for call in message["tool_calls"]]
    return [{"role": "assistant", "content": message["content"]}] * bool(message.get("content")) + [
        {
            "role": "assistant",
            "metadata": call["name"],
            "content": call["arguments"].strip() or "{}",
        }
        for call in calls
    ]


def is_begun_call(message: dict) -> bool:
    return (
        message["role"] == "assistant" and bool(message.get("metadata")) and not message["content"]
    )


def released_pieces(messages: list[dict], tools=None) -> list[str]:
    """Header and content are pieces of their own, so that a header's line break never merges with the text behind it.

    Tools are told in a system turn before their message; an empty message is no turn.
    """
    pieces = [Special("[gMASK]"), Special("<sop>")]
    for message in with_tools(messages, tools):
        if message.get("tools"):
            pieces += [
                Special("<|system|>"),
                "\n",
                WITH_TOOLS + "".join(map(describe_tool, message["tools"])),
            ]
        if message["content"] or message["pictures"]:
            marks = [Special(mark) for mark in PICTURE * message["pictures"]]
            pieces += [
                Special(f"<|{message['role']}|>"),
                f"{message['metadata']}\n",
                *marks,
                message["content"],
            ]
    return [*pieces, Special("<|assistant|>")]


def template_pieces(template: ChatTemplate, messages: list[dict], tools=None) -> list[str]:
    """The rendered text, cut at the special pieces that the template itself wrote."""
    if re.search(
        r"\[['\"]tools['\"]\]|\.tools\b", template.source
    ):  # the release's looks in the messages
        messages = with_tools(messages, tools)
        tools = None
    hidden = [
        {**m, "content": _hide(m["content"]), "metadata": _hide(m["metadata"])} for m in messages
    ]
    cut = ANY_SPECIAL.split(template.render(hidden, tools))
    return [
        Special(piece)
        if piece in SPECIAL
        else HIDDEN.sub(lambda mark: SPECIAL[ord(mark[0][1]) - 0xE000], piece)
        for piece in cut
        if piece
    ]


def _hide(text: str) -> str:
    return ANY_SPECIAL.sub(lambda found: "\ue000" + chr(0xE000 + SPECIAL.index(found[0])), text)


def with_tools(messages: list[dict], tools) -> list[dict]:
    return [
        {"role": "system", "content": "", "metadata": "", "pictures": 0, "tools": tools}
    ] * bool(tools) + messages


def describe_tool(tool: dict) -> str:
    """A function as the release's system turn tells it."""
    if tool.get("type") != "function":
        raise ModelError(
            f"tool of type {tool.get('type')!r} is not known; give functions: "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
        )
    function = tool["function"]
    return TOOL.format(function["name"], json.dumps(function, ensure_ascii=False, indent=4))


def is_chatglm(config: dict) -> bool:
    """The network of ChatGLM2 and later (their predecessors have no key/value groups)."""
    return config.get("model_type") == "chatglm" and "multi_query_group_num" in config


def chatglm_decoder(config: dict) -> DecoderConfig:
    """Fields of the `chatglm` layout; defaults are those of the release's config class."""
    supported(config, CHATGLM_ONLY)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("kv_channels") or hidden // heads
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
    """Fields of transformers' `glm` layout; defaults are those of its GlmConfig, which are GLM-4-9B's."""
    supported(config, {"hidden_act": "silu"})
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


def supported(config: dict, only: dict):
    """ModelError if a setting changes the network into one that no release of these families has."""
    for field, value in only.items():
        if config.get(field, value) != value:
            raise ModelError(
                f"config.json has {field} = {config[field]!r}, which none of the released models has "
                f"(they have {value!r}); take config.json from the release"
            )


def chatglm_weights(d: DecoderConfig, qkv_bias: bool):
    """Weight table of the `chatglm` layout: qkv rows are [q; k; v] already, in adjacent rotary pairs."""
    rows = (d.heads + 2 * d.kv_heads) * d.head_dim
    fold = functools.partial(
        fold_qkv, rotated=(d.heads + d.kv_heads) * d.head_dim, order=rotary_order(d)
    )
    yield Weight(
        "transformer.embedding.word_embeddings.weight",
        (d.vocab_size, d.hidden),
        (Part("embed.weight"),),
    )
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
    yield Weight(
        "transformer.output_layer.weight", (d.vocab_size, d.hidden), (Part("lm_head.weight"),)
    )


def rotary_order(d: DecoderConfig):
    return interleaved_order(d.head_dim, d.rope.dim)


def fold_qkv(rows, rotated: int, order):
    """Rows [q; k; v]: permute the heads of the first `rotated` rows, q and k."""
    out = rows.clone()
    out[:rotated] = permute_heads(rows[:rotated], order)
    return out
