"""The demo network: the toolkit's own vision encoder, a trainable ChatGLM-6B decoder, and the release's file layout."""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))

from models.families.visualglm import VisionEncoder

ALPHA = math.sqrt(2 * 28)  # the release computes it from 28 layers whatever the configuration says
ROWS = 32

EVA = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 1,
    "layernorm_order": "pre",
    "model_parallel_size": 1,
    "max_sequence_length": 257,
    "inner_hidden_size": 384,
    "use_final_layernorm": False,
    "layernorm_epsilon": 1e-06,
    "image_size": [224, 224],
    "pre_len": 1,
    "post_len": 0,
    "in_channels": 3,
    "num_classes": 0,
    "patch_size": 14,
}
QFORMER = {
    "num_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "vocab_size": ROWS,
    "layernorm_order": "post",
    "model_parallel_size": 1,
    "max_sequence_length": 0,
    "is_decoder": [True, False, True],
    "cross_attn_hidden_size": 128,
    "layernorm_epsilon": 1e-12,
}
MODEL = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage",
    },
    "hidden_size": 128,
    "inner_hidden_size": 512,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 4,
    "num_layers": 4,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "image_length": ROWS,
    "eva_config": EVA,
    "qformer_config": QFORMER,
}


def make_config(tokenizer) -> dict:
    return {**MODEL, **tokenizer.ids, "vocab_size": tokenizer.vocabulary}


def make_tower(config: dict) -> VisionEncoder:
    tower = VisionEncoder(config)
    for name, p in tower.named_parameters():
        if p.dim() > 1 and "position" not in name and "queries" not in name:
            fan_in = p[0].numel() if p.dim() == 4 else p.shape[0]
            nn.init.normal_(p, std=1 / math.sqrt(fan_in))
        elif name.endswith(("position", "cls", "queries")):
            nn.init.normal_(p, std=0.5 if "queries" in name else 0.1)
        elif "bias" in name:
            nn.init.zeros_(p)
    nn.init.normal_(tower.project.weight, std=0.01)
    return tower


def see(tower: VisionEncoder, patches, keep=None):
    """Raw patches [B, K, 14, 14, 3] at positions keep [B, K] (None = all) -> (rows [B, 32, hidden], tokens [B, K, C]).

    Training on a part of the patches is several times cheaper than the whole grid; the formulas are the encoder's own.
    """
    vit = tower.vit
    flat = vit.normalize(patches.flatten(0, 1).float()).flatten(1)
    x = F.linear(flat, vit.patch.weight.flatten(1), vit.patch.bias).unflatten(0, patches.shape[:2])
    x = x + (vit.position[1:] if keep is None else vit.position[1:][keep])
    x = torch.cat(((vit.cls + vit.position[:1]).expand(len(x), 1, -1), x), dim=1)
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    return tower.project(tower.qformer(x)), x[:, 1:]


class Layer(nn.Module):
    """ChatGLM-6B block: residuals are the *normalised* values times alpha; qkv is interleaved per head."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["hidden_size"]
        inner = config["inner_hidden_size"]
        eps = config["layernorm_epsilon"]
        self.heads = config["num_attention_heads"]
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.dense_h_to_4h = nn.Linear(width, inner)
        self.dense_4h_to_h = nn.Linear(inner, width)

    def forward(self, h, turn, mask):
        x = self.input_layernorm(h)
        heads = self.query_key_value(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        scores = rotate(q, turn) @ rotate(k, turn).transpose(2, 3) / math.sqrt(k.shape[-1])
        mixed = torch.softmax(scores + mask.to(scores.dtype), dim=-1) @ v
        x = self.post_attention_layernorm(x * ALPHA + self.dense(mixed.transpose(1, 2).flatten(2)))
        return x * ALPHA + self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


def rotate(t, turn):
    """Rotary embedding: the first half of the head is rotated by position, the second by block position."""
    cos, sin = turn
    a, b = t.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3).to(t.dtype)


class Decoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(width, config["layernorm_epsilon"])
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self._start()

    def _start(self):
        nn.init.normal_(self.word_embeddings.weight, std=0.2)
        # alpha shrinks every branch against its residual: start the branches larger
        gains = {"query_key_value": 1, "dense": 3, "dense_h_to_4h": 1, "dense_4h_to_h": 3}
        for layer in self.layers:
            for name, gain in gains.items():
                linear = getattr(layer, name)
                nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.lm_head.weight, std=0.05)

    def forward(self, x, positions, context, taps=None):
        """x [B, T, width], positions [B, T, 2] -> hidden states; the first context[b] tokens see each other."""
        angles = positions[..., None].float() * self.inv_freq  # [B, T, 2, d]
        turn = angles.cos()[:, None], angles.sin()[:, None]
        steps = torch.arange(x.shape[1])
        later = steps[None, :] > steps[:, None]
        hidden = later & (steps[None, None, :] >= context[:, None, None])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e4)
        for layer in self.layers:
            x = layer(x, turn, mask[:, None])
            if taps is not None:
                taps.append(x)
        return self.final_layernorm(x)


def inverse_frequencies(config):
    """Rounded to fp16, as the release does when it builds them."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    return (1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)).half().float()


# ------------------------------------------------------------------------------------------------- release layout


def vision_table(config: dict):
    """(release name, our names to stack, linear?) for every tensor of the encoder."""
    vit = "image_encoder.vit."
    former = "image_encoder.qformer.transformer."
    yield vit + "mixins.patch_embedding.proj.weight", ["vit.patch.weight"], False
    yield vit + "mixins.patch_embedding.proj.bias", ["vit.patch.bias"], False
    yield vit + "transformer.word_embeddings.weight", ["vit.cls"], False
    yield vit + "transformer.position_embeddings.weight", ["vit.position"], False
    yield former + "word_embeddings.weight", ["qformer.queries"], False
    yield from _affine(vit + "mixins.cls.ln_vision", ["vit.norm"], False)
    yield from _affine(former + "final_layernorm", ["qformer.norm"], False)
    yield from _affine("image_encoder.glm_proj", ["project"], True)
    for i in range(config["eva_config"]["num_layers"]):
        yield from _block(
            f"{vit}transformer.layers.{i}.", f"vit.blocks.{i}.", "attention_norm", "mlp_norm"
        )
    for i, cross in enumerate(config["qformer_config"]["is_decoder"]):
        theirs = f"{former}layers.{i}."
        ours = f"qformer.layers.{i}."
        yield from _block(theirs, ours, "input_norm", "attention_norm")
        if cross:
            yield from _affine(
                theirs + "post_cross_attention_layernorm", [ours + "cross_norm"], False
            )
            yield from _affine(theirs + "cross_attention.query", [ours + "cross.q"], True)
            yield from _affine(
                theirs + "cross_attention.key_value", [ours + "cross.k", ours + "cross.v"], True
            )
            yield from _affine(theirs + "cross_attention.dense", [ours + "cross.out"], True)


def _block(theirs, ours, first_norm, second_norm):
    yield from _affine(theirs + "input_layernorm", [ours + first_norm], False)
    yield from _affine(theirs + "post_attention_layernorm", [ours + second_norm], False)
    yield from _affine(
        theirs + "attention.query_key_value", [f"{ours}attention.{c}" for c in "qkv"], True
    )
    yield from _affine(theirs + "attention.dense", [ours + "attention.out"], True)
    yield from _affine(theirs + "mlp.dense_h_to_4h", [ours + "mlp.up"], True)
    yield from _affine(theirs + "mlp.dense_4h_to_h", [ours + "mlp.down"], True)


def _affine(theirs, ours, linear):
    yield theirs + ".weight", [o + ".weight" for o in ours], linear
    yield theirs + ".bias", [o + ".bias" for o in ours], False


def decoder_name(ours: str) -> str:
    """word_embeddings.weight -> transformer.word_embeddings.weight, layers.0.dense.. -> ..layers.0.attention.dense.."""
    groups = {
        "query_key_value": "attention",
        "dense_h_to_4h": "mlp",
        "dense_4h_to_h": "mlp",
        "dense": "attention",
    }
    for part, group in groups.items():
        if f".{part}." in ours:
            ours = ours.replace(f".{part}.", f".{group}.{part}.")
            break
    return ours if ours.startswith("lm_head") else "transformer." + ours


def save_release(folder: Path, config: dict, tower: nn.Module, decoder: nn.Module) -> None:
    """config.json and model.safetensors (fp16) with the released names."""
    state = tower.state_dict()
    tensors = {}
    for name, parts, linear in vision_table(config):
        tensors[name] = torch.cat([state[p].T if linear else state[p] for p in parts])
    for name, value in decoder.state_dict().items():
        tensors[decoder_name(name)] = value
    for i in range(config["num_layers"]):
        tensors[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = decoder.inv_freq.clone()
    halves = {name: value.detach().half().contiguous() for name, value in tensors.items()}
    save_file(halves, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def load_release(folder: Path) -> tuple[dict, VisionEncoder, Decoder]:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(str(folder / "model.safetensors"))
    tower = make_tower(config)
    decoder = Decoder(config)
    state = {}
    for name, parts, linear in vision_table(config):
        for part, piece in zip(parts, tensors[name].float().chunk(len(parts))):
            state[part] = piece.T if linear else piece
    tower.load_state_dict(state)
    decoder.load_state_dict(
        {name: tensors[decoder_name(name)].float() for name in decoder.state_dict()}
    )
    return config, tower, decoder
