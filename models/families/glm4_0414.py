"""GLM-4-9B-0414, GLM-4-32B-0414 and GLM-Z1: GLM-4 with a norm behind each branch of a layer.

Takes config.json and messages; returns decoder settings, weight table, stop ids and prompts in the
words of the directory's chat template. GLM-Z1's template opens the thought, `<think>`, itself.
"""

from dataclasses import replace

from models.family import SamplingDefaults
from models.prompt.chat_template import ChatTemplate, directory_template

from .glm4 import SPECIAL, Glm4, hf_decoder, template_pieces

TEMPLATE = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
{{- '<|system|>\n# 可用工具' }}
{%- for tool in tools %}
{%- set function = tool.function if tool.function is defined else tool %}
{{- '\n\n## ' + function.name + '\n\n' }}
{{- function | tojson(indent=4, ensure_ascii=False) }}
{{- '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}
{%- endfor %}
{%- endif %}
{%- for message in messages if message.role == 'system' %}
{{- '<|system|>\n' + message.content }}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
{{- '<|' + message.role + '|>' + message.metadata + '\n' + message.content }}
{%- endfor %}
{{- '<|assistant|>' }}"""


class Glm4_0414(Glm4):
    """Roles, tools and tokenizer files are GLM-4's."""

    name = "glm-4-0414"

    @classmethod
    def matches(cls, config):
        if config.get("model_type") == "glm4" and "vision_config" not in config:
            return "config.json has model_type glm4 and no vision_config"

    def _decoder(self):
        return replace(hf_decoder(self.config), post_norms=True)

    def release_sampling(self, with_image):
        """The release names no sampling: transformers takes the most likely token."""
        return SamplingDefaults(max_length=self.decoder.max_length, temperature=0.0)

    def _pieces(self, messages, tools):
        """The prompt in the words of the directory's template, else of `TEMPLATE`."""
        template = directory_template(self.directory, bool(tools)) or ChatTemplate(TEMPLATE)
        special = self.tokenizer.special_tokens() or SPECIAL
        return template_pieces(template, messages, tools, special)
