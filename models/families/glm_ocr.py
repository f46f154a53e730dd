"""GLM-OCR (0.9B): a tower with norms on queries and keys in front of a small decoder that reads
documents.

The release has one more layer for predicting several tokens at a time (MTP); it is not used.
"""

from models.family import SamplingDefaults
from models.network.patch_tower import PatchTowerConfig

from .vl_vision import PatchedFamily


class GlmOcr(PatchedFamily):
    name = "glm-ocr"
    qkv_bias = False
    default_template = """\
{{- '[gMASK]<sop>' }}
{%- set off = enable_thinking is defined and not enable_thinking %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- for part in message.content %}
{{- '<|begin_of_image|><|image|><|end_of_image|>' if part.type == 'image' else part.text }}
{%- endfor %}
{{- '/nothink' if off and message.role == 'user' }}
{%- endfor %}
{{- '<|assistant|>\\n' }}
{{- '<think></think>\\n' if off }}"""

    @classmethod
    def matches(cls, config):
        if config.get("model_type") == "glm_ocr":
            return "config.json has model_type glm_ocr"

    def tower_config(self, tower):
        return PatchTowerConfig(
            width=tower["hidden_size"],
            layers=tower["depth"],
            heads=tower["num_heads"],
            inner=tower["intermediate_size"],
            merged=tower["out_hidden_size"] * 3,
            out=tower["out_hidden_size"],
            eps=tower["rms_norm_eps"],
            bias=tower["attention_bias"],
            qk_norm=True,
            positions=0,
        )

    def release_sampling(self, with_image):
        return SamplingDefaults(max_length=self.decoder.max_length, temperature=0.0)
