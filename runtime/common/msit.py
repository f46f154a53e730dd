"""Columns of msit's comparison tables."""

# the columns of msit's comparison of dumps (two of them are called DataType: the second is ours to drop)
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
