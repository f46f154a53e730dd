"""What the fast backends share: torch's fused kernels, and how an accelerator is asked for facts.

Takes and returns what ReferenceOps does, whose arithmetic it is; each backend derives from one of
the two classes and replaces more.
"""

from torch.nn import functional as F

from .reference import ReferenceOps


class FusedOps(ReferenceOps):
    """The reference with torch's fused layer norm and in-place cache writes."""

    def layer_norm(self, x, norm, eps):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)

    def cache_write(self, k, v, keys, values, slots):
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, v)


class AcceleratorOps(FusedOps):
    """Operators of a device with memory of its own, which can record decode steps as graphs."""

    records_graphs = True

    def __init__(self, device: str):
        """`device`: torch's name of it, e.g. "cuda:0"."""
        self.device = device

    @property
    def accelerator(self):
        """torch.cuda or torch.npu: the module that records graphs and knows the memory."""
        raise NotImplementedError

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that the device computes in, the preferred one first."""
        raise NotImplementedError

    def default_dtype(self, family) -> str:
        """What --dtype auto means: the dtype of the released weights if the device computes in
        it."""
        released = family.config.get("torch_dtype") or family.config.get("dtype")
        return released if released in self.dtypes else self.dtypes[0]

    def free_memory(self) -> int:
        """Bytes free on the device, with what torch keeps for itself after a model was closed."""
        kept = self.accelerator.memory_reserved(self.device)
        kept -= self.accelerator.memory_allocated(self.device)
        return self.accelerator.mem_get_info(self.device)[0] + kept

    def peak_bytes(self) -> int:
        """Most memory that torch has had on the device."""
        return self.accelerator.max_memory_allocated(self.device)
