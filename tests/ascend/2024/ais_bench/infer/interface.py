"""Stand-in for ais_bench 0.0.2 of 2024: modes by name, each prepared from the shapes at every
call."""

import aclruntime
import numpy as np


def dims_of(inputs, feeds) -> str:
    parts = [f"{desc.name}:{','.join(map(str, feed.shape))}" for desc, feed in zip(inputs, feeds)]
    return ";".join(parts)


class InferSession:
    def __init__(self, device_id, model_path, acl_json_path=None, debug=False, loop=1):
        self.session = aclruntime.InferenceSession(
            model_path, device_id, aclruntime.session_options()
        )
        self.names = [desc.name for desc in self.session.get_outputs()]

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def set_dynamic_batchsize(self, batch):
        self.session.set_dynamic_batchsize(batch)

    def set_dynamic_dims(self, text):
        self.session.set_dynamic_dims(text)

    def infer(self, feeds, mode="static", custom_sizes=100000, out_array=True):
        feeds = [np.ascontiguousarray(feed) for feed in feeds]
        self._prepare(mode, feeds)
        tensors = [
            aclruntime.BaseTensor(feed.__array_interface__["data"][0], feed.nbytes)
            for feed in feeds
        ]
        outputs = self.session.run(self.names, tensors)
        for output in outputs:
            output.to_host()
        return [np.array(output) for output in outputs]

    def _prepare(self, mode, feeds):
        if mode == "static":
            self.session.set_staticbatch()
        elif mode == "dymbatch":
            self.session.set_dynamic_batchsize(len(feeds[0]))
        elif mode == "dymdims":
            self.session.set_dynamic_dims(dims_of(self.get_inputs(), feeds))
        else:
            raise RuntimeError(f"wrong infer_mode:{mode}")

    def summary(self):
        return self.session.sumary()

    def reset_summaryinfo(self):
        self.session.reset_sumaryinfo()

    def free_resource(self):
        self.session.free_resource()

    @staticmethod
    def finalize():
        aclruntime.InferenceSession.finalize()
