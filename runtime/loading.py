"""Reads the decoder's weights from the checkpoint straight into the backend's form, one tensor at a time."""
import torch

MATRICES = ("qkv.weight", "out.weight", "up.weight", "down.weight", "lm_head.weight")


def decoder_rows(family, split):
    """The weight table of the decoder, or of the part of it that `split` gives to this device."""
    return (w for w in split.weights(family.weights()) if w.parts and not w.parts[0].target.startswith("vision."))


def decoder_weights(checkpoint, family, dtype: torch.dtype, device: str, ops, split) -> dict:
    """Canonical name -> tensor of `dtype` on `device`, the part that `split` gives to it; matrices packed by `ops` as soon
    as they are complete.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    weights, console = {}, Console(stderr=True)     # stdout belongs to the answer
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        rows = decoder_rows(family, split)
        for name, tensor in checkpoint.assemble(rows, dtype=dtype, progress=lambda done, total: bar.update(
                task, completed=done, total=total)):
            tensor = tensor.to(device)
            weights[name] = ops.pack(tensor) if name.endswith(MATRICES) else tensor
    return weights
