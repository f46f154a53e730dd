"""Builds stand-ins for the CANN and NNAL libraries that the torch_npu wheel links to, so that it
runs with no NPU.

    python tests/npu/stand_in_cann.py FOLDER

Takes the installed wheel (its undefined symbols and the names it looks up) and cann/*.c, writes
shared libraries into FOLDER. With FOLDER in LD_LIBRARY_PATH the wheel sees one device in host memory, all of
torch_npu's own C++ runs, and every kernel is a no-op that is written to STUB_LOG. Values are
garbage: only the log can be tested. Needs gcc, g++ and nm.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).with_name("cann")
EMPTY = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "ascend_hal")
OURS = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])\w+$")  # plain C symbols of CANN
OPTIONAL = re.compile(r"(aclrt|aclmdlRI|aclsys|aclSet|aclGet|aclop|aclInit|aclFin)\w*$")
KERNEL = re.compile(
    r"aclnn\w+$|acl(Create|Destroy)(Tensor|Scalar|Int|Float|Bool)\w*(?<!Desc)(?<!Buffer)$"
)


def output_of(*command) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def wheel_libraries() -> list[Path]:
    wheel = Path(sysconfig.get_paths()["platlib"]) / "torch_npu"
    return [*sorted(wheel.glob("lib/*.so")), *sorted(wheel.glob("_C*.so"))]


def needed_symbols(libraries) -> set[str]:
    """Symbols that the wheel's libraries leave undefined (weak ones apart)."""
    lines = [
        line.split()
        for library in libraries
        for line in output_of("nm", "-D", "--undefined-only", library)
    ]
    return {fields[-1].split("@")[0] for fields in lines if fields and fields[-2] != "w"}


def named_symbols(libraries) -> set[str]:
    """Names of CANN functions among the strings of the libraries, which they look up while
    running."""
    found = set()
    for library in libraries:
        found |= set(
            re.findall(rb"(?<![\w])(?:acl|Hccl|Atb[A-Z])\w{4,}(?=\0)", library.read_bytes())
        )
    return {name.decode() for name in found}


def functions(names, body="return 0;") -> str:
    return "".join(f"long {name}(void) {{ {body} }}\n" for name in sorted(names))


def kernels(names) -> str:
    """aclnn kernels: asking for the workspace is the call that is logged."""
    text = "void *malloc(unsigned long);\n"
    for name in sorted(names):
        if name.endswith("GetWorkspaceSize"):
            text += functions(
                [name], f'stub_log("%s\\n", "{name.removesuffix("GetWorkspaceSize")}"); return 0;'
            )
        elif name.startswith("aclCreate"):
            text += f"void *{name}(void) {{ return malloc(64); }}\n"
        else:
            text += functions([name])
    return text


def atb_source(needed, named) -> str:
    created = re.compile(r"_ZN3atb15CreateOperationINS_5infer\d+([A-Za-z]+)EEEiRKT_")
    types = sorted({found for name in needed for found in created.findall(name)})
    c_names = {
        re.sub(r"GetWorkspaceSize$", "", n)
        for n in named
        if n.startswith("Atb") and not n.endswith("Api")
    }
    c_text = functions(c_names) + "".join(
        functions([n + "GetWorkspaceSize"], f'stub_log("%s\\n", "{n}"); return 0;')
        for n in sorted(c_names)
    )
    declared = "".join(f"struct {t} {{}};\n" for t in types)
    instances = "".join(
        f"template int CreateOperation(const infer::{t} &, Operation **);\n" for t in types
    )
    source = (SOURCES / "atb.cpp").read_text().replace("PARAMETER_TYPES", declared)
    return source.replace("INSTANCES", instances).replace("C_INTERFACE", c_text)


def compile_library(folder: Path, name: str, source: str, suffix: str = ".c"):
    file = folder / (name + suffix)
    file.write_text(source)
    links = [] if name == "ascendcl" else ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
    subprocess.run(
        [
            "g++" if suffix == ".cpp" else "gcc",
            "-shared",
            "-fPIC",
            "-w",
            file,
            f"-Wl,-soname,lib{name}.so",
            "-o",
            folder / f"lib{name}.so",
            *links,
        ],
        check=True,
    )


def without(names, source: str) -> set[str]:
    return set(names) - set(re.findall(r"(\w+)\(", source))


def build(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    libraries = wheel_libraries()
    needed = needed_symbols(libraries)
    named = named_symbols(libraries)
    runtime, collectives, opapi = (
        (SOURCES / f"{name}.c").read_text() for name in ("ascendcl", "hccl", "opapi")
    )
    kernel_names = {n for n in named if KERNEL.match(n)}
    plain = {n for n in needed if OURS.match(n)} | {
        n for n in named if OPTIONAL.match(n)
    } - kernel_names
    compile_library(
        folder, "ascendcl", runtime + functions(without(plain, runtime + opapi + collectives))
    )
    compile_library(
        folder,
        "hccl",
        collectives
        + functions(without({n for n in needed | named if n.startswith("Hccl")}, collectives)),
    )
    compile_library(folder, "nnopbase", functions(["aclDestroyAclOpExecutor"]))
    for name in EMPTY:
        compile_library(folder, name, "")
    compile_library(folder, "opapi", opapi + kernels(without(kernel_names, opapi)))
    compile_library(folder, "atb", atb_source(needed, named), ".cpp")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
