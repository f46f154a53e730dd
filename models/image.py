"""Pictures to arrays: open safely, bring to RGB upright, resize and crop as each family's original does."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
