"""The demo model and how the tests ask it."""

import paths

from runtime import SamplingParams

DEMO = paths.DEMO / "checkpoint"
GREEDY = SamplingParams(max_tokens=48, temperature=0)


def answers(engine, asked, wrapper=None):
    """Texts for [(picture, question)] in one batch."""
    prompts = [
        engine.prompt(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": picture},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            language=wrapper,
        )
        for picture, question in asked
    ]
    return [result.text for result in engine.generate(prompts, GREEDY)]
