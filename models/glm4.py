"""GLM-4-9B-chat, in the `chatglm` layout of its release and in the `-hf` layout of transformers. GLM-4V builds on it.

config.json flows in; decoder settings, weight table, stop ids and tokenised prompts flow out.
"""
import functools
import json
import re

import numpy as np

from .base import DecoderConfig, Family, Layout, ModelError, Part, Prompt, Rope, SamplingDefaults, Weight
from .base import pair, split_content
from .layers import interleaved_order, permute_heads
from .text import MissingTokenizer, TiktokenText

SPECIAL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
           "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
ROLES = ("system", "user", "assistant", "observation")
CHATGLM_ONLY = {"rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "multi_query_attention": True,
                "apply_residual_connection_post_layernorm": False, "pre_seq_len": None}
HF_ONLY = {"hidden_act": "silu", "rope_scaling": None}
WITH_TOOLS = ("你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
              "你的任务是针对用户的问题和要求提供适当的答复和支持。")
TOOL = "\n\n## {}\n\n{}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


class Special(str):
    """A piece of a prompt that is one token of the vocabulary; every other piece is plain text, whatever it looks like."""


class Glm4(Family):
    """One wording serves every language: the model answers in the language of the question."""
    name = "glm-4"
    unstable_tail = re.compile(r"\[\[?[训练时间]{0,4}\]?$")

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
        path = self.directory / "tokenizer.model"
        return TiktokenText(path, SPECIAL) if path.is_file() else MissingTokenizer(path)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn, whichever file names it: stopping at one of them only runs on into a made-up turn."""
        named = [c.get("eos_token_id") for c in (self._generation_config(), self.config)]
        ids = {i for n in named if n is not None for i in (n if isinstance(n, list) else [n])}
        return tuple(sorted(ids | {self.tokenizer.token_id(piece) for piece in STOPS} - {None}))

    def release_sampling(self, with_picture):
        return SamplingDefaults(max_length=min(8192, self.decoder.max_length), temperature=0.8, top_p=0.8)

    def clean(self, answer):
        """Without the line break the model begins with. A tool call keeps the tool's name, its first line."""
        return answer.strip().replace("[[训练时间]]", "2023年")

    # prompts

    def prompt(self, messages, language="zh", tools=None) -> Prompt:
        """Chat messages -> Prompt.

        Roles: system, user, assistant, observation (a tool's result). An assistant message may carry "metadata", the
        name of the tool it calls. tools: function descriptions as OpenAI has them, also as "tools" of any message.
        """
        if tools:
            messages = [{"role": "system", "content": "", "tools": tools}, *messages]
        if not messages or messages[-1]["role"] not in ("user", "observation"):
            raise ModelError("the conversation does not end with a user message or an observation; add a question")
        pieces, pictures = [Special("[gMASK]"), Special("<sop>")], []
        for message in messages:
            new, text = self._content(message)
            pieces += self._turns(message, text, new)
            pictures += new
        pieces.append(Special("<|assistant|>"))
        return self._arrange(self._encode(pieces), [self.pixels(p) for p in pictures], text="".join(pieces))

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """ids [T] and pixels [n, ...] as the release feeds its model."""
        pictures = [] if pixels is None else [self.pixels(np.asarray(p)[None]) for p in np.asarray(pixels)]
        return self._arrange(np.asarray(ids, dtype=np.int64).reshape(-1), pictures, image_starts)

    def pixels(self, source):
        raise ModelError(f"{self.name} is a text model and takes no picture; leave the picture out")

    def _content(self, message) -> tuple[list, str]:
        return split_content(message["content"])

    def _turns(self, message, text, pictures) -> list[str]:
        """A message's pieces: tools are told in a system turn of their own, an empty message is no turn."""
        role, pieces = message["role"], []
        if role not in ROLES:
            raise ModelError(f"{self.name} has no role {role!r}; use one of {', '.join(ROLES)}")
        if message.get("tools"):
            pieces += [Special("<|system|>"), "\n", WITH_TOOLS + "".join(map(describe_tool, message["tools"]))]
        if text or pictures:
            marks = [Special(mark) for _ in pictures for mark in ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")]
            pieces += [Special(f"<|{role}|>"), f"{message.get('metadata', '')}\n", *marks, text]
        return pieces

    def _encode(self, pieces) -> np.ndarray:
        """Every piece by itself, as the release does: a header's line break never merges with the text behind it."""
        ids = [[self.tokenizer.token_id(p)] if isinstance(p, Special) else self.tokenizer.encode(p) for p in pieces]
        return np.array(sum(ids, []), dtype=np.int64)

    def _arrange(self, ids, pixels, image_starts=None, text="") -> Prompt:
        return Prompt(ids, [], Layout(np.arange(len(ids))[:, None], (len(ids),), (1,)), text)

    # weights

    def weights(self) -> list[Weight]:
        if self.hf:
            return list(hf_weights(self.decoder, self.config.get("attention_bias", True)))
        return list(chatglm_weights(self.decoder, self.config.get("add_qkv_bias", False)))


def is_chatglm(config: dict) -> bool:
    """The network of ChatGLM2 and later (their predecessors have no key/value groups)."""
    return config.get("model_type") == "chatglm" and "multi_query_group_num" in config


def chatglm_decoder(config: dict) -> DecoderConfig:
    """Fields of the `chatglm` layout; defaults are those of the release's config class."""
    supported(config, CHATGLM_ONLY)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("kv_channels") or hidden // heads
    return DecoderConfig(
        vocab_size=config["padded_vocab_size"], hidden=hidden, layers=config["num_layers"], heads=heads,
        kv_heads=config["multi_query_group_num"], head_dim=head_dim, ffn=config["ffn_hidden_size"],
        rope=Rope(dim=head_dim // 2, theta=10000.0 * config.get("rope_ratio", 1)),
        eps=config.get("layernorm_epsilon", 1e-5), max_length=config.get("seq_length", 2048))


def hf_decoder(config: dict) -> DecoderConfig:
    """Fields of transformers' `glm` layout (GLM-4 -hf, GLM-Edge), old and new spelling of the rope's.

    Defaults are those of transformers' GlmConfig: they are GLM-4-9B's.
    """
    supported(config, HF_ONLY)
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **config, **(config.get("rope_parameters") or {})}
    supported(rope, {"rope_type": "default"})
    head_dim = config.get("head_dim", 128)
    return DecoderConfig(
        vocab_size=config["vocab_size"], hidden=config["hidden_size"], layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"], kv_heads=config.get("num_key_value_heads", 2), head_dim=head_dim,
        ffn=config["intermediate_size"], rope=Rope(int(head_dim * rope["partial_rotary_factor"]), theta=rope["rope_theta"]),
        eps=config.get("rms_norm_eps", 1.5625e-07), max_length=config.get("max_position_embeddings", 131072))


def supported(config: dict, only: dict):
    """ModelError if a setting changes the network into one that no release of these families has."""
    for field, value in only.items():
        if config.get(field, value) != value:
            raise ModelError(f"config.json has {field} = {config[field]!r}, which none of the released models has "
                             f"(they have {value!r}); take config.json from the release")


def chatglm_weights(d: DecoderConfig, qkv_bias: bool):
    """Weight table of the `chatglm` layout: qkv rows are [q; k; v] already, in adjacent rotary pairs."""
    rows = (d.heads + 2 * d.kv_heads) * d.head_dim
    fold = functools.partial(fold_qkv, rotated=(d.heads + d.kv_heads) * d.head_dim, order=rotary_order(d))
    yield Weight("transformer.embedding.word_embeddings.weight", (d.vocab_size, d.hidden), (Part("embed.weight"),))
    yield Weight("transformer.rotary_pos_emb.inv_freq", (d.rope.dim // 2,), optional=True)
    for i in range(d.layers):
        layer, ours = f"transformer.encoder.layers.{i}.", f"layers.{i}."
        yield from pair(layer + "self_attention.query_key_value", (rows, d.hidden), ours + "qkv", fold, qkv_bias)
        yield from pair(layer + "self_attention.dense", (d.hidden, d.heads * d.head_dim), ours + "out", bias=False)
        yield from pair(layer + "mlp.dense_h_to_4h", (2 * d.ffn, d.hidden), ours + "up", bias=False)
        yield from pair(layer + "mlp.dense_4h_to_h", (d.hidden, d.ffn), ours + "down", bias=False)
        yield from pair(layer + "input_layernorm", (d.hidden,), ours + "attention_norm", bias=False)
        yield from pair(layer + "post_attention_layernorm", (d.hidden,), ours + "mlp_norm", bias=False)
    yield from pair("transformer.encoder.final_layernorm", (d.hidden,), "final_norm", bias=False)
    yield Weight("transformer.output_layer.weight", (d.vocab_size, d.hidden), (Part("lm_head.weight"),))


def hf_weights(d: DecoderConfig, qkv_bias: bool):
    """Weight table of transformers' `glm` layout (GLM-4 -hf, GLM-Edge), with an lm_head of its own."""
    yield Weight("model.embed_tokens.weight", (d.vocab_size, d.hidden), (Part("embed.weight"),))
    for i in range(d.layers):
        layer, ours = f"model.layers.{i}.", f"layers.{i}."
        yield from _separate_qkv(d, layer + "self_attn.", ours + "qkv", qkv_bias)
        yield from pair(layer + "self_attn.o_proj", (d.hidden, d.heads * d.head_dim), ours + "out", bias=False)
        yield from pair(layer + "mlp.gate_up_proj", (2 * d.ffn, d.hidden), ours + "up", bias=False)
        yield from pair(layer + "mlp.down_proj", (d.hidden, d.ffn), ours + "down", bias=False)
        yield from pair(layer + "input_layernorm", (d.hidden,), ours + "attention_norm", bias=False)
        yield from pair(layer + "post_attention_layernorm", (d.hidden,), ours + "mlp_norm", bias=False)
    yield from pair("model.norm", (d.hidden,), "final_norm", bias=False)
    yield Weight("lm_head.weight", (d.vocab_size, d.hidden), (Part("lm_head.weight"),))


def _separate_qkv(d, source, target, bias):
    total, offset = (d.heads + 2 * d.kv_heads) * d.head_dim, 0
    permute = functools.partial(permute_heads, order=rotary_order(d))
    for name, heads, transform in (("q", d.heads, permute), ("k", d.kv_heads, permute), ("v", d.kv_heads, None)):
        rows = heads * d.head_dim
        for suffix, shape in ((".weight", (rows, d.hidden)), (".bias", (rows,)))[:1 + bias]:
            part = Part(target + suffix, at=(offset, total), transform=transform)
            yield Weight(f"{source}{name}_proj{suffix}", shape, (part,))
        offset += rows


def rotary_order(d: DecoderConfig):
    return interleaved_order(d.head_dim, d.rope.dim)


def fold_qkv(rows, rotated: int, order):
    """Rows [q; k; v]: permute the heads of the first `rotated` rows, q and k."""
    out = rows.clone()
    out[:rotated] = permute_heads(rows[:rotated], order)
    return out


def describe_tool(tool: dict) -> str:
    """A function as the release's system turn tells it."""
    if tool.get("type") != "function":
        raise ModelError(f"tool of type {tool.get('type')!r} is not known; give functions: "
                         '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}')
    function = tool["function"]
    return TOOL.format(function["name"], json.dumps(function, ensure_ascii=False, indent=4))
