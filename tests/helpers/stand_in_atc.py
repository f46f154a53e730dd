"""A stand-in for CANN's `atc`, with the documented option grammar and exit protocol; it compiles nothing.

On success it prints the success line, exits with 0 and writes an .om-like file: the ONNX with its weights inside, input
and output of the types that the options ask for (AIPP's arithmetic included), and the options in its metadata. On
failure it always exits with 255 and prints error codes on stdout, or wrong flag syntax on stderr. It was written from
the documentation of ATC, not from convert's tables. STAND_IN_ATC in the environment makes it misbehave (see `MISBEHAVE`).
"""

import json
import os
import re
import signal
import sys
from pathlib import Path


def words(text: str) -> list[str]:
    return text.split()


FAILED = 255
PRECISION = words(
    "force_fp16 force_fp32 cube_fp16in_fp32out allow_mix_precision allow_fp32_to_fp16 must_keep_origin_dtype "
    "allow_mix_precision_fp16 allow_mix_precision_bf16 allow_fp32_to_bf16"
)
PRECISION_2 = words("fp16 origin cube_fp16in_fp32out mixed_float16 mixed_bfloat16")
PRECISION_2_NEW = ["cube_hif8", "mixed_hif8"]  # 9.0
CHIPS = words(
    "310P1 310P2 310P3 310P4 310P5 310P7 310B1 310B2 310B3 310B4 910A 910B 910ProA 910ProB 910B1 910B2 910B2C 910B3 "
    "910B4 910B4-1 910_9362 910_9372 910_9381 910_9382 910_9391 910_9392"
)
CHOICES = {
    "framework": words("0 1 3 5"),
    "mode": words("0 1 3 5 6"),
    "log": words("debug info warning error null"),
    "precision_mode": PRECISION,
    "input_format": words("NCHW ND NCDHW"),
    "external_weight": words("0 1"),
    "buffer_optimize": words("l1_optimize l2_optimize off_optimize"),
    "deterministic": words("0 1"),
    "op_select_implmode": words(
        "high_precision high_performance high_precision_for_all high_performance_for_all"
    ),
    "output_type": words("FP32 FP16 UINT8 INT8"),
    "op_debug_level": words("0 1 2 3 4"),
    "enable_small_channel": words("0 1"),
    "status_check": words("0 1"),
}
FREE = words(
    "model output soc_version input_shape dynamic_batch_size dynamic_image_size dynamic_dims input_shape_range "
    "insert_op_conf input_fp16_nodes keep_dtype modify_mixlist op_precision_mode optypelist_for_implmode out_nodes "
    "fusion_switch_file precision_mode_v2"
)
NEW = {
    "jit_compile": words("0 1 2"),
    "oo_level": words("O1 O3"),
    "is_weight_clip": words("0 1"),
}  # 9.0
FILES = ("model", "insert_op_conf", "keep_dtype", "modify_mixlist", "op_precision_mode")
GEARS = ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims", "input_shape_range")
AIPP_KEYS = re.compile(
    r"aipp_mode|related_input_rank|input_format|src_image_size_[wh]|crop|padding|csc_switch|"
    r"rbuv_swap_switch|mean_chn_[0-3]|min_chn_[0-3]|var_reci_chn_[0-3]"
)
# behaviour -> suffixes of the .om files that it writes
SUFFIXES = {
    "no file": [],
    "suffix": ["_linux_x86_64"],
    "two files": ["", "_linux_aarch64"],
}
# fmt: off
MISBEHAVE = {  # or an error code and its text
    "killed", "wrapper killed", "silent", "no file", "suffix", "two files", "disk full", "no permission", "library",
    "weights", "slow",
}
# fmt: on


class Refused(Exception):
    pass


def refuse(code, text):
    raise Refused(f"{code}: [PID: {os.getpid()}] 2025-01-01-00:00:00.000.000 {text}")


def parse(arguments, version):
    options = {}
    rest = list(arguments)
    known = {*CHOICES, *FREE, *(NEW if version >= 9 else ())}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("-"):
            syntax(f"Non-option parameter: {word}")
        if name not in known:
            syntax(f"ERROR: unknown command line flag '{name}'")
        if not equals and not rest:
            syntax(f"ERROR: flag '--{name}' is missing its argument")
        options[name] = value if equals else rest.pop(0)
    return options


def syntax(text):
    print(text, file=sys.stderr)
    raise Refused


def check(options, version):
    for name in ("model", "output", "soc_version"):
        if not options.get(name):
            refuse("E10054", f"Parameter [{name}] is required and cannot be empty.")
    if "framework" not in options:
        refuse("E10007", "Parameter [--framework] is required.")
    for name, value in options.items():
        allowed = CHOICES.get(name) or NEW.get(name) or [value]
        if value not in allowed:
            reason = "is invalid. Reason: not supported."
            refuse("E10001", f"Value [{value}] for parameter [--{name}] {reason}")
    check_precision(options, version)
    chip = options["soc_version"]
    if chip.removeprefix("Ascend") not in CHIPS:
        refuse("E10001", f"Value [{chip}] for parameter [--soc_version] is invalid.")
    check_files(options)


def check_files(options):
    for name in FILES:
        if name in options:
            path = Path(options[name]).resolve()
            if not path.is_file():
                refuse("E10410", f"File [{path}] for [--{name}] does not exist.")
            check_path(path)
    if options["output"].endswith("/"):
        refuse("E10022", "Parameter [--output] is invalid, no file name.")
    check_path(Path(options["output"]).resolve())


def check_path(path):
    if not re.fullmatch("[\u4e00-\u9fa5A-Za-z0-9./_-]+", str(path)):
        refuse("E10001", f"Value [{path}] is an invalid path.")
    if len(str(path)) > 4096:
        refuse("E10021", "Path too long.")


def check_precision(options, version):
    if "precision_mode" in options and "precision_mode_v2" in options:
        refuse("E10056", "[--precision_mode] and [--precision_mode_v2] are mutually exclusive.")
    mode = options.get("precision_mode_v2", "fp16")
    old_mode = options.get("precision_mode", "")
    known = PRECISION_2 + PRECISION_2_NEW if version >= 9 else PRECISION_2
    if mode not in known:
        refuse("E10001", f"Value [{mode}] for parameter [--precision_mode_v2] is invalid.")
    mixed = mode.startswith("mixed_") or old_mode.startswith("allow_mix_precision")
    if "modify_mixlist" in options:
        if not mixed:
            refuse("E10001", "[--modify_mixlist] needs a mix precision mode.")
        lists = json.loads(Path(options["modify_mixlist"]).read_text())
        if not set(lists) <= {"black-list", "white-list", "gray-list"}:
            refuse("E10032", "Failed to parse json file.")
    if "bf" in mode and options["soc_version"].startswith("Ascend310P"):
        refuse("E10001", f"Value [{mode}] is not supported by the chip.")
    if "optypelist_for_implmode" in options and "op_select_implmode" not in options:
        refuse("E10001", "Parameters must be set at the same time.")


def check_graph(options):
    import onnx

    path = Path(options["model"]).resolve()
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:
        refuse("E13005", f"Protobuf parse of [{path}] failed.")
    for tensor in model.graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if place and not (path.parent / place["location"]).is_file():
            refuse("E10410", f"File [{place['location']}] does not exist.")
    opset = [entry.version for entry in model.opset_import if entry.domain == ""][-1]
    if not 8 <= opset <= 18:
        op = model.graph.node[0].op_type
        refuse("E16002", f"No parser is registered for Op [ai.onnx::{opset}::{op}].")
    check_inputs(options, model.graph.input)
    return path


def check_inputs(options, inputs):
    declared = {value.name: declared_shape(value) for value in inputs}
    shapes = parse_shapes(options.get("input_shape", ""), declared)
    for name, shape in shapes.items():
        if len(shape) != len(declared[name]):
            refuse("E10049", f"Dim count of [{name}] does not match.")
        if any(a not in (-1, b) and b != -1 for a, b in zip(shape, declared[name])):
            refuse("E10050", f"Shape {shape} of [{name}] is out of the range {declared[name]}.")
    check_gears(options, shapes, declared)
    if "insert_op_conf" in options:
        check_aipp(options, shapes)
    half_inputs = options.get("input_fp16_nodes", inputs[0].name).split(";")
    unknown = set(half_inputs) - set(declared)
    if unknown:
        refuse("E10016", f"Opname {sorted(unknown)} is not found in the model.")


def declared_shape(value) -> list[int]:
    """Dimensions of a graph input; -1 for a free one."""
    return [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]


def parse_shapes(text, names):
    shapes = {}
    for part in filter(None, text.split(";")):
        name, colon, dims = part.rpartition(":")
        if not re.fullmatch(r"-?\d+(,-?\d+)*", dims) or not colon:
            refuse("E10002", f"Value [{text}] of [--input_shape] is invalid.")
        if name not in names:
            refuse("E10016", f"Opname [{name}] is not found in the model.")
        shapes[name] = list(map(int, dims.split(",")))
    return shapes


def check_gears(options, shapes, declared):
    given = [name for name in GEARS if name in options]
    if len(given) > 1:
        refuse("E10009", f"{given} are mutually exclusive.")
    free = [name for name, shape in shapes.items() if -1 in shape]
    if not given:
        return
    if not shapes:
        refuse("E10004", "Value for [--input_shape] is empty.")
    if not free:
        refuse("E10040", "[--input_shape] needs -1 with a dynamic option.")
    if given == ["dynamic_dims"]:
        check_dims(options, shapes, declared)
        return
    if given != ["dynamic_batch_size"]:
        refuse("E10003", "the stand-in knows gears of the batch and of dims only")
    for name in free:
        if shapes[name][0] != -1 or -1 in shapes[name][1:] or declared[name][0] != -1:
            rule = "only the first dim may be -1, and must be in the model."
            refuse("E10018", f"Shape {shapes[name]} of [{name}]: {rule}")
    check_batch_sizes(options["dynamic_batch_size"].split(","))


def check_dims(options, shapes, declared):
    if options.get("input_format") != "ND":
        refuse("E10001", "[--dynamic_dims] needs [--input_format] ND.")
    free = sum(shape.count(-1) for shape in shapes.values())
    for name, shape in shapes.items():
        if any(size == -1 and declared[name][i] != -1 for i, size in enumerate(shape)):
            refuse("E10050", f"Shape {shape} of [{name}] is out of the range {declared[name]}.")
    gears = options["dynamic_dims"].split(";")
    if not all(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", gear) for gear in gears):
        refuse("E10033", "gears hold more than positive numbers")
    if any(len(gear.split(",")) != free for gear in gears):
        refuse("E10045", f"Each gear needs {free} numbers.")
    if len(gears) < 2:
        refuse("E10035", "At least 2 gears are needed.")
    if len(set(gears)) < len(gears):
        refuse("E10039", "Gears repeat.")


def check_batch_sizes(sizes):
    if not all(size.isdigit() for size in sizes):
        refuse("E10033", "gears hold more than digits")
    if len(sizes) < 2:
        refuse("E10035", "At least 2 gears are needed.")
    if len(sizes) > 100:
        refuse("E10036", "More than 100 gears.")
    if len(set(sizes)) < len(sizes):
        refuse("E10039", "Gears repeat.")
    if "0" in sizes:
        refuse("E10038", "Gears must be positive.")


def aipp_values(options):
    text = Path(options["insert_op_conf"]).read_text()
    body = re.fullmatch(r"\s*aipp_op\s*\{(.*)\}\s*", text, re.DOTALL)
    if body is None:
        refuse("E10052", "AIPP config cannot be parsed.")
    return dict(line.strip().split(": ") for line in body[1].strip().splitlines())


def check_aipp(options, shapes):
    if options.get("input_format", "NCHW") != "NCHW":
        refuse("E10001", "AIPP needs [--input_format] NCHW.")
    if "input_fp16_nodes" in options:
        refuse("E10034", "An AIPP input cannot be in [--input_fp16_nodes].")
    if "dynamic_dims" in options:
        refuse("E10001", "[--insert_op_conf] with [--dynamic_dims].")
    values = aipp_values(options)
    [shape] = shapes.values()
    wrong = []
    for key, value in values.items():
        whole_mean = not key.startswith("mean") or re.fullmatch(r"\d{1,3}", value)
        if not AIPP_KEYS.fullmatch(key) or not whole_mean:
            wrong.append(key)
    if wrong or values["aipp_mode"] != "static" or "input_format" not in values:
        refuse("E10052", f"AIPP config is invalid: {wrong}")
    if shape[1:] != [3, int(values["src_image_size_h"]), int(values["src_image_size_w"])]:
        refuse("E10052", f"AIPP picture does not fit the NCHW input {shape}.")


def add_casts(model, options):
    """Puts the .om's input and output types, and AIPP's arithmetic, around the ONNX graph."""
    from onnx import TensorProto, helper

    graph = model.graph
    image = model.graph.input[0]
    result = model.graph.output[0]
    rename(graph, result.name, "inner_output")
    if "insert_op_conf" in options:
        rename(graph, image.name, "inner_input")
        nodes = aipp_nodes(graph, image, aipp_values(options))
    else:
        nodes = []
        half = options.get("input_fp16_nodes", "").split(";")
        for value in graph.input:
            inner = f"inner_{value.name}"
            rename(graph, value.name, inner)
            is_half = value.name in half
            value.type.tensor_type.elem_type = TensorProto.FLOAT16 if is_half else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [value.name], [inner], to=TensorProto.FLOAT))
    for node in reversed(nodes):
        graph.node.insert(0, node)
    kind = TensorProto.FLOAT16 if options.get("output_type") == "FP16" else TensorProto.FLOAT
    result.type.tensor_type.elem_type = kind
    graph.node.append(helper.make_node("Cast", ["inner_output"], [result.name], to=kind))


def aipp_nodes(graph, image, values):
    """Makes the input uint8 NHWC; returns nodes that compute (x - mean - min) * var_reci and transpose to NCHW."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    batch, _, height, width = image.type.tensor_type.shape.dim
    shape = [batch.dim_value or "batch", height.dim_value, width.dim_value, 3]
    image.CopyFrom(helper.make_tensor_value_info(image.name, TensorProto.UINT8, shape))
    nodes = [helper.make_node("Cast", [image.name], ["aipp"], to=TensorProto.FLOAT)]
    last = "aipp"
    for op, key in (("Sub", "mean_chn"), ("Sub", "min_chn"), ("Mul", "var_reci_chn")):
        table = [float(values[f"{key}_{c}"]) for c in range(3)]
        graph.initializer.append(numpy_helper.from_array(np.array(table, np.float32), key))
        nodes.append(helper.make_node(op, [last, key], [f"aipp_{key}"]))
        last = f"aipp_{key}"
    nodes.append(helper.make_node("Transpose", [last], ["inner_input"], perm=[0, 3, 1, 2]))
    return nodes


def rename(graph, old, new):
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def compile_(options, path, behaviour):
    import onnx

    if behaviour == "disk full":
        raise OSError(28, "No space left on device")
    if behaviour == "no permission":
        raise PermissionError(13, "Permission denied", options["output"])
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_from_external_data(model)
    add_casts(model, options)
    onnx.helper.set_model_props(model, options)
    Path("fusion_result.json").write_text("{}")
    for suffix in SUFFIXES.get(behaviour, [""]):
        onnx.save(model, f"{options['output']}{suffix}.om")
    if behaviour == "weights" or options.get("external_weight") == "1":
        Path(options["output"]).parent.joinpath("weight").mkdir()
        Path(options["output"]).parent.joinpath("weight", "weight_0").write_bytes(b"w" * 64)


def misbehave(behaviour):
    if behaviour == "slow":
        import time

        time.sleep(60)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "wrapper killed":
        sys.exit(137)
    if behaviour == "library":
        print(
            "atc.bin: error while loading shared libraries: libascend_hal.so: cannot open",
            file=sys.stderr,
        )
        sys.exit(127)
    if re.match(r"[EWI][0-9A-Z]\d{4}", behaviour):
        refuse(*behaviour.split(" ", 1))


def main(arguments, version):
    behaviour = os.environ.get("STAND_IN_ATC", "")
    try:
        print("ATC start working now, please wait for a moment.\n...", flush=True)
        options = parse(arguments, version)
        misbehave(behaviour)
        check(options, version)
        compile_(options, check_graph(options), behaviour)
    except (Refused, OSError) as error:
        print("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
        print(error if isinstance(error, Refused) else f"E19999: Internal Error!\nE19999: {error}")
        return FAILED
    if behaviour != "silent":
        print("ATC run success, welcome to the next use.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], int(sys.argv[1].split(".")[0])))
