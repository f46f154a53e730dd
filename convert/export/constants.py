"""Constants of a graph that is being changed. Takes values, returns the graph's initializer."""

import numpy as np
import onnx_ir as ir


def whole_numbers(graph: ir.Graph, values: np.ndarray) -> ir.Value:
    """The int64 constant of these values, a shape or pads; made if the graph has none."""
    name = "free_" + "_".join(str(value).replace("-", "m") for value in values)
    if name not in graph.initializers:
        tensor = ir.tensor(values.astype(np.int64))
        constant = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(tensor.shape),
        )
        graph.register_initializer(constant)
    return graph.initializers[name]
