"""Pictures to arrays: open safely, bring to RGB upright, resize and crop as each family's original does."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(source):
    from PIL import Image
    return (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")


def squash(image, size: int):
    import numpy as np
    from PIL import Image
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)[None]


def denormalize(nchw, mean, std, shape):
    """float32 [1, 3, S, S], normalised -> [1, S, S, 3] raw 0..255; an array already of `shape` passes unchanged."""
    import numpy as np
    if nchw.shape == tuple(shape):
        return nchw.astype(np.float32)
    mean, std = (np.array(v, dtype=np.float32).reshape(1, 3, 1, 1) for v in (mean, std))
    return np.ascontiguousarray(((nchw * std + mean) * 255).transpose(0, 2, 3, 1))
