"""GLM-4 and GLM-4V a second time in plain torch, and random checkpoints in their released layouts.

The tests compare our models with it. It shares nothing with `models/` but the names and shapes of the weight table,
which have a test of their own.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F


def random_checkpoint(directory, config, family, storage="one", seed=0):
    """Writes config.json and every tensor of the family's table, N(0, 0.1), norms around 1 -> {name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for weight in family(directory, config).weights():
        values = torch.randn(weight.shape, generator=generator) * 0.1
        if "norm" in weight.source and weight.source.endswith("weight"):
            values += 1
        tensors[weight.source] = values
    (directory / "config.json").write_text(json.dumps(config))
    save(directory, tensors, storage)
    return tensors


def save(directory, tensors, storage):
    """Writes the tensors; storage: a phrase with "bin" or not, and "sharded" (three files) or not."""
    whole = "pytorch_model.bin" if "bin" in storage else "model.safetensors"
    files = [whole]
    if "sharded" in storage:
        stem, _, suffix = whole.partition(".")
        files = [f"{stem}-{number:05}-of-00003.{suffix}" for number in (1, 2, 3)]
    index = {name: files[i % len(files)] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor.clone() for name, tensor in tensors.items() if index[name] == file}
        if "bin" in storage:
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file)
    if len(files) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (directory / f"{whole}.index.json").write_text(text)


def chatglm_names(tensors, config):
    """-hf names -> `chatglm` names, qkv fused; `chatglm` tensors are returned as they are."""
    if config["model_type"] != "glm":
        return tensors
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    embedding = tensors["model.embed_tokens.weight"]
    out = {
        "transformer.embedding.word_embeddings.weight": embedding,
        "transformer.output_layer.weight": tensors.get("lm_head.weight", embedding),
        "transformer.encoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        theirs = f"model.layers.{i}."
        ours = f"transformer.encoder.layers.{i}."
        for hf, chatglm in names.items():
            out[f"{ours}{chatglm}.weight"] = tensors[f"{theirs}{hf}.weight"]
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in tensors:
                out[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(
                    [tensors[f"{theirs}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                )
    return out


def text_logits(tensors, config, sizes, x, positions):
    """x [T, hidden] embeddings, positions [T]; sizes: layers, heads, kv, head_dim, rotary, theta, eps -> [T, vocab]."""
    t = chatglm_names(tensors, config)
    hidden_from = torch.ones(len(x), len(x)).triu(1).bool()
    for i in range(sizes["layers"]):
        get = layer_tensors(t, i)
        normed = rms(x, get["input_layernorm.weight"], sizes["eps"])
        x = x + attention(normed, get, sizes, positions, hidden_from)
        normed = rms(x, get["post_attention_layernorm.weight"], sizes["eps"])
        gate, up = (normed @ get["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ get["mlp.dense_4h_to_h.weight"].T
    x = rms(x, t["transformer.encoder.final_layernorm.weight"], sizes["eps"])
    return x @ t["transformer.output_layer.weight"].T


def layer_tensors(tensors, index):
    """{name inside the layer: tensor} of a decoder layer."""
    found = {}
    for name, tensor in tensors.items():
        if f"encoder.layers.{index}." in name and "vision" not in name:
            found[name.split(f"layers.{index}.")[1]] = tensor
    return found


def attention(x, get, s, positions, hidden_from):
    name = "self_attention.query_key_value"
    qkv = F.linear(x, get[f"{name}.weight"], get.get(f"{name}.bias"))
    heads = qkv.view(len(x), -1, s["head_dim"])
    q, k, v = heads.split([s["heads"], s["kv"], s["kv"]], 1)
    q = rotate(q, s, positions)
    k = rotate(k, s, positions)
    out = []
    for head in range(s["heads"]):
        group = head // (s["heads"] // s["kv"])
        scores = q[:, head] @ k[:, group].T / s["head_dim"] ** 0.5
        weights = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
        out.append(weights @ v[:, group])
    return torch.cat(out, -1) @ get["self_attention.dense.weight"].T


def rotate(x, s, positions):
    """Rotary embedding of adjacent pairs in the first channels, as complex numbers."""
    rotary = s["rotary"]
    angles = positions[:, None] / s["theta"] ** (
        torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
    )
    pairs = torch.view_as_complex(x[..., :rotary].double().reshape(*x.shape[:2], -1, 2))
    turned = pairs * torch.exp(1j * angles)[:, None]
    return torch.cat((torch.view_as_real(turned).flatten(2).float(), x[..., rotary:]), -1)


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def picture_rows(tensors, config, pixels):
    """pixels float [1, 3, S, S], normalised -> [rows, hidden], the rows that replace the image's tokens."""
    t = {k.removeprefix("transformer.vision."): v for k, v in tensors.items() if "vision" in k}
    c = config["vision_config"]
    width = c["hidden_size"]
    eps = c["layer_norm_eps"]

    def layer(x, name):
        return F.linear(x, t[name + ".weight"], t.get(name + ".bias"))

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], t[name + ".weight"], t[name + ".bias"], eps)

    x = F.conv2d(
        pixels, t["patch_embedding.proj.weight"], t["patch_embedding.proj.bias"], c["patch_size"]
    )
    x = torch.cat((t["patch_embedding.cls_embedding"], x[0].flatten(1).T))
    x = x + t["patch_embedding.position_embedding.weight"]
    for i in range(c["num_hidden_layers"]):
        name = f"transformer.layers.{i}."
        qkv = layer(x, name + "attention.query_key_value")
        q, k, v = qkv.view(len(x), 3, c["num_heads"], -1).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + norm(layer(mixed, name + "attention.dense"), name + "input_layernorm", eps)
        inner = F.gelu(layer(x, name + "mlp.fc1"))
        x = x + norm(layer(inner, name + "mlp.fc2"), name + "post_attention_layernorm", eps)
    grid = int((len(x) - 1) ** 0.5)
    patches = x[1:].T.view(1, width, grid, grid)
    x = F.conv2d(patches, t["conv.weight"], t["conv.bias"], 2)[0].flatten(1).T
    x = F.gelu(norm(layer(x, "linear_proj.linear_proj"), "linear_proj.norm1", 1e-5))
    gated = F.silu(layer(x, "linear_proj.gate_proj")) * layer(x, "linear_proj.dense_h_to_4h")
    x = layer(gated, "linear_proj.dense_4h_to_h")
    return torch.cat((t["boi"][0], x, t["eoi"][0])) / c["scaling_factor"]


def chatglm_config(**changes) -> dict:
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 2,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "ffn_hidden_size": 56,
        "padded_vocab_size": 90,
        "seq_length": 256,
        "rope_ratio": 500,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1.5625e-07,
        "eos_token_id": [1, 2],
        "boi_token_id": 80,
        "eoi_token_id": 81,
    }
    return {**config, **changes}


def hf_config(**changes) -> dict:
    config = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 56,
        "vocab_size": 90,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 5e6,
    }
    return {**config, **changes}


def sizes_of(config) -> dict:
    """The sizes that `text_logits` takes, read from the fields of either layout as specified."""
    if config["model_type"] == "glm":
        rope = {"partial_rotary_factor": 0.5, **config, **config.get("rope_parameters", {})}
        return {
            "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            "kv": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "theta": rope["rope_theta"],
            "rotary": int(config["head_dim"] * rope["partial_rotary_factor"]),
            "eps": config["rms_norm_eps"],
        }
    return {
        "layers": config["num_layers"],
        "heads": config["num_attention_heads"],
        "head_dim": config["kv_channels"],
        "kv": config["multi_query_group_num"],
        "rotary": config["kv_channels"] // 2,
        "theta": 10000 * config["rope_ratio"],
        "eps": config["layernorm_epsilon"],
    }


def rng_ids(count, vocabulary=80, seed=0):
    return np.random.default_rng(seed).integers(3, vocabulary, count)
