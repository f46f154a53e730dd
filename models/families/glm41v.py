"""GLM-4.1V-9B (Base and Thinking) and GLM-4.6V-Flash: a tower with a sampled position map in front
of the decoder of GLM-4-0414.

Both releases are of model_type glm4v; transformers also knows glm46v, which computes the same.
"""

from models.config import PATCH, patch_grid
from models.family import SamplingDefaults
from models.network.patch_tower import PatchTowerConfig

from .vl_vision import PatchedFamily


class Glm41V(PatchedFamily):
    name = "glm-4.1v"
    qkv_bias = True
    default_template = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- for part in message.content %}
{{- '<|begin_of_image|><|image|><|end_of_image|>' if part.type == 'image' else part.text }}
{%- endfor %}
{%- endfor %}
{{- '<|assistant|>\\n' }}"""

    @classmethod
    def matches(cls, config):
        if config.get("model_type") in ("glm4v", "glm46v") and "vision_config" in config:
            return f"config.json has model_type {config['model_type']} and a vision_config"

    def tower_config(self, tower):
        return PatchTowerConfig(
            width=tower["hidden_size"],
            layers=tower["depth"],
            heads=tower["num_heads"],
            inner=tower["out_hidden_size"],
            merged=tower["intermediate_size"],
            out=tower["out_hidden_size"],
            eps=tower["rms_norm_eps"],
            bias=tower["attention_bias"],
            qk_norm=False,
            positions=patch_grid(tower["image_size"], PATCH, least=2),
        )

    def release_sampling(self, with_image):
        return SamplingDefaults(
            max_length=self.decoder.max_length, temperature=0.8, top_p=0.6, top_k=2
        )
