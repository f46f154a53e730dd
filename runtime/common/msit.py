"""The columns of the table that msit's compare writes of two dumps."""

# msit repeats DataType; we write it once
MSIT_COLUMNS = (
    "Index",
    "OpType",
    "NPUDump",
    "DataType",
    "Address",
    "GroundTruth",
    "TensorIndex",
    "Shape",
    "Overflow",
    "CosineSimilarity",
    "MaxAbsoluteError",
    "AccumulatedRelativeError",
    "RelativeEuclideanDistance",
    "KullbackLeiblerDivergence",
    "StandardDeviation",
    "MeanAbsoluteError",
    "RootMeanSquareError",
    "MaxRelativeError",
    "MeanRelativeError",
    "CompareFailReason",
    "IsNpuOps",
    "IsOutputNode",
    "IsPrecisionError",
)
