"""The demo model's folder, and questions to it."""

import paths

from runtime import SamplingParams

DEMO = paths.DEMO / "checkpoint"
GREEDY = SamplingParams(max_tokens=48, temperature=0)


def answers(engine, asked, wrapper=None):
    """Greedy answers to [(image, question)] in one batch; wrapper: language of the prompt's
    wording."""
    prompts = []
    for image, question in asked:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        prompts.append(engine.prompt([message], language=wrapper))
    return [result.text for result in engine.generate(prompts, GREEDY)]
