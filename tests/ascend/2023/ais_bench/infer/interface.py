"""Stand-in for ais_bench of 2023: `infer` knows no gears and hands raw pointers on, whatever the
strides."""

import aclruntime
import numpy as np


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

    def infer(self, feeds, mode="static", custom_sizes=100000):
        tensors = [
            aclruntime.BaseTensor(feed.__array_interface__["data"][0], feed.nbytes)
            for feed in feeds
        ]
        outputs = self.session.run(self.names, tensors)
        for output in outputs:
            output.to_host()
        return [np.array(output) for output in outputs]

    def sumary(self):
        return self.session.sumary()

    def reset_sumaryinfo(self):
        self.session.reset_sumaryinfo()

    def finalize(self):
        self.session.finalize()
