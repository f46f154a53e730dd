"""Stand-in for the ais_bench fork of 2026: checks its arguments, forwards unknown names, frees
itself."""

import aclruntime
import numpy as np


class InferSession:
    def __init__(
        self,
        device_id,
        model_path,
        acl_json_path=None,
        debug=False,
        loop=1,
        weight_dir=None,
        options=None,
    ):
        if not model_path.endswith(".om"):
            raise ValueError("model path must end in .om")
        self.session = None
        self.session = aclruntime.InferenceSession(
            model_path, device_id, options or aclruntime.session_options()
        )
        self.device_id = device_id

    def __getattr__(self, name):
        return getattr(self.session, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.__del__()

    def __del__(self):
        if self.session is not None:
            self.session.free_resource()
            self.session = None

    def infer(
        self,
        feeds,
        mode="static",
        custom_sizes=100000,
        out_array=True,
        iteration_times=1,
        in_out_list=None,
    ):
        if not isinstance(feeds, list):
            raise ValueError("the list be checked is not a list!")
        if mode not in ("static", "dymbatch", "dymhw", "dymdims", "dymshape"):
            raise ValueError("infer mode is illegal, Please check.")
        tensors = [aclruntime.Tensor(np.ascontiguousarray(feed), self.device_id) for feed in feeds]
        if mode == "dymbatch":
            self.session.set_dynamic_batchsize(len(feeds[0]))
        elif mode == "dymdims":
            parts = [
                f"{desc.name}:{','.join(map(str, feed.shape))}"
                for desc, feed in zip(self.session.get_inputs(), feeds)
            ]
            self.session.set_dynamic_dims(";".join(parts))
        else:
            self.session.set_staticbatch()
        outputs = self.session.run([desc.name for desc in self.session.get_outputs()], tensors)
        for output in outputs:
            output.to_host()
        return [np.array(output) for output in outputs]

    def summary(self):
        return self.session.summary()

    def reset_summaryinfo(self):
        self.session.reset_summaryinfo()
