"""Measures llama.cpp through llama-cpp-python's C interface.

The checkpoint becomes an F16 GGUF of the architecture `llama`, whose rotary embedding (adjacent pairs, over the full
head) is GLM-Edge's; llama.cpp makes the other types from it.
"""

import ctypes
import json
import time
from pathlib import Path

import job

TYPES = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K_M"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build(work, folder):
    if work["variant"] == "f16":
        write_f16(Path(work["checkpoint"]), folder / "model.gguf")
        return
    import llama_cpp

    source = Path(work["work"]) / "llamacpp-f16/model.gguf"
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{TYPES[work['variant']]}")
    params.nthread = work["threads"]
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(folder / "model.gguf").encode(), ctypes.byref(params)
    )
    if status:
        raise SystemExit(f"llama_model_quantize of {source} failed (status {status})")


def write_f16(checkpoint, file):
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["num_hidden_layers"]
    ffn = config["intermediate_size"]
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    for name, values in tensors(checkpoint):
        for target, part in renamed(name, values, ffn):
            writer.add_tensor(target, part.astype(np.float16 if part.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(checkpoint):
    """Yields (name, float32 array) of every tensor in the checkpoint's bfloat16 safetensors."""
    import numpy as np

    for file in sorted(checkpoint.glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        data = np.memmap(file, dtype=np.uint16, mode="r", offset=8 + size)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            bits = data[first // 2 : last // 2].astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def renamed(name, values, ffn):
    """[(GGUF's name, tensor)] for one tensor of the checkpoint; ffn: rows of the gate in a fused gate_up."""
    ends = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in ends:
        return [(ends[name], values)]
    layer, kind = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    if kind == "mlp.gate_up_proj":
        gate = f"blk.{layer}.ffn_gate.weight"
        up = f"blk.{layer}.ffn_up.weight"
        return [(gate, values[:ffn]), (up, values[ffn:])]
    return [(f"blk.{layer}.{NAMES[kind]}.weight", values)]


def run(work, folder):
    import llama_cpp

    llama_cpp.llama_backend_init()
    start = time.perf_counter()
    model = llama_cpp.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    context = llama_cpp.llama_init_from_model(model, context_params(llama_cpp, work))
    decoder = GreedyDecoder(llama_cpp, model, context, work)
    loaded = time.perf_counter() - start
    decoder.answer(0, job.WARM_UP)
    return {
        "load_s": loaded,
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "settings": llama_cpp.llama_print_system_info().decode().strip(),
        **decoder.answer(1, work["new"]),
    }


def context_params(library, work):
    params = library.llama_context_default_params()
    batch = work["batch"]
    length = work["prompt"]
    params.n_ctx = batch * (length + work["new"] + 64)
    params.n_batch = batch * length
    params.n_ubatch = length
    params.n_threads = work["threads"]
    params.n_threads_batch = work["threads"]
    params.n_seq_max = batch
    return params


class GreedyDecoder:
    """Decodes answers of `work["batch"]` sequences together, greedily."""

    def __init__(self, library, model, context, work):
        self.library = library
        self.context = context
        self.work = work
        self.memory = library.llama_get_memory(context)
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self.batch = library.llama_batch_init(work["batch"] * work["prompt"], 0, work["batch"])

    def answer(self, turn, new):
        """Decodes `new` tokens after the prompts of a turn -> figures in seconds."""
        self.library.llama_memory_clear(self.memory, True)
        prompts = job.prompts(self.work, turn)
        start = time.perf_counter()
        last = len(prompts[0]) - 1
        rows = []
        for sequence, prompt in enumerate(prompts):
            rows += [(token, at, sequence, at == last) for at, token in enumerate(prompt)]
        tokens = self._decode(rows)
        stamps = [time.perf_counter()]
        for position in range(last + 1, last + new):
            rows = [(token, position, sequence, True) for sequence, token in enumerate(tokens)]
            tokens = self._decode(rows)
            stamps.append(time.perf_counter())
        return job.means(stamps, start)

    def _decode(self, rows) -> list[int]:
        """rows of (token, position, sequence, sampled?) -> the most likely next token of each row to sample."""
        for i, (token, position, sequence, sampled) in enumerate(rows):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = sampled
        self.batch.n_tokens = len(rows)
        if self.library.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        return [self._most_likely(i) for i, row in enumerate(rows) if row[3]]

    def _most_likely(self, row: int) -> int:
        import numpy as np

        logits = self.library.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


if __name__ == "__main__":
    job.main(build, run)
