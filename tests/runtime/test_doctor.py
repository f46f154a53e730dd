"""The doctor on machines that stand in for real ones (tests/ascend/machines.py), each broken in one way, and on this one."""

import json
import os
import shutil
import subprocess
import sys

import machines
import paths
import pytest

from runtime.ascend import host
from runtime.ascend.cann import numbers
from runtime.ascend.host import Host, parse_npu_smi
from runtime.common.errors import run_command
from runtime.doctor import __main__ as doctor
from runtime.doctor import cann, checks
from runtime.doctor.check import BROKEN, MISMATCH, MISSING, NOTE, OK, WARNING

ROOT = paths.ROOT


@pytest.fixture
def here(tmp_path):
    return machines.machine(tmp_path)


def broken(stand_in) -> dict:
    """{component: fix} of what the doctor would have mended."""
    return {
        check.name: check.fix for check in checks.examine(stand_in).checks if check.status in BROKEN
    }


# machines on which everything fits


@pytest.mark.parametrize(
    ("cann", "chip"),
    [("9.1.0", "910B4"), ("9.1.0", "910B3"), ("9.1.1", "310P3"), ("9.1.0", "910B4-1")],
)
def test_a_machine_where_everything_fits(tmp_path, cann, chip):
    found = checks.examine(machines.machine(tmp_path, cann, chip))
    assert broken(machines.machine(tmp_path, cann, chip)) == {} and found.passed and found.has_npu
    assert {device.soc for device in found.devices} == {f"Ascend{chip}"} and len(found.devices) == 2
    assert all(check.status == OK for check in found.checks)
    assert doctor.verdict(found).startswith("NPU: everything")


def test_a_laptop(tmp_path):
    laptop = machines.StandIn(
        tmp_path, {}, {"torch": "2.13.0+cpu"}, {"smi": (127, ""), "torch": (0, "{}")}
    )
    found = checks.examine(laptop)
    assert found.passed and not found.has_npu
    assert doctor.verdict(found) == "CPU only: everything for chat, convert (ONNX), compare is here"


def test_a_build_machine_has_cann_and_no_npu(tmp_path):
    machines.toolkit(tmp_path, "8.3.RC1")
    found = checks.examine(
        machines.StandIn(tmp_path, {}, {"torch": "2.13.0"}, {"smi": (127, ""), "torch": (0, "{}")})
    )
    assert (
        found.passed
        and "8.3.RC1 (for atc"
        in {check.name: check.found for check in found.checks}["CANN toolkit"]
    )


def test_torch_npu_without_cann_breaks_torch_on_a_laptop(tmp_path):
    error = (
        "ImportError: libhccl.so: cannot open shared object file: No such file or directory\n"
        "RuntimeError: Failed to load the backend extension: torch_npu."
    )  # as torch 2.13 says it
    laptop = machines.StandIn(
        tmp_path,
        {},
        {"torch": "2.13.0", "torch_npu": "2.13.0"},
        {"smi": (127, ""), "torch": (1, error)},
    )
    assert broken(laptop)["torch"].startswith("export TORCH_DEVICE_BACKEND_AUTOLOAD=0")
    assert "cannot be imported: ImportError: libhccl.so" in checks.examine(laptop).checks[-1].found


# npu-smi


def test_the_tables_of_npu_smi():
    a2, duo, a3 = (
        parse_npu_smi(table.format(chip=chip, health="OK", driver="25.5.2"))
        for table, chip in ((machines.HBM, "910B4"), (machines.DDR, "310P3"), (machines.PAIRED, ""))
    )
    assert [(d.npu, d.chip, d.soc, d.used, d.total) for d in a2] == [
        (0, 0, "Ascend910B4", 3419, 65536),
        (1, 0, "Ascend910B4", 3356, 65536),
    ]
    assert [(d.npu, d.chip, d.soc, d.total) for d in duo] == [
        (96, 0, "Ascend310P3", 44280),
        (96, 1, "Ascend310P3", 43693),
    ]
    assert [(d.npu, d.chip, d.soc) for d in a3] == [(0, 0, "Ascend910"), (0, 1, "Ascend910")]
    assert parse_npu_smi("dcmi module initialize failed. ret is -8005") == []


def test_versions_are_numbers():
    assert (
        numbers("8.3.RC1") == (8, 3)
        and numbers("26.0.rc1") == (26, 0)
        and numbers("") == numbers("latest") == ()
    )
    assert numbers("8.10.0") > numbers("8.9.1")


# one thing broken: what is named, and the line that mends it


def drop(path):
    return lambda m: (m.root / path).unlink()


def answer(kind, code, text):
    return lambda m: m.answers.update({kind: (code, text)})


def packages(**versions):
    return lambda m: m.packages.update(versions)


def environ(**variables):
    return lambda m: m.environ.update(variables)


def another_toolkit(m):
    other = machines.toolkit(m.root, "8.3.RC1")
    m.environ["LD_LIBRARY_PATH"] += f":{other}/lib64"


def no_kernels(m):
    for kernels in (
        m.root.glob("usr/local/Ascend/*/opp/built-in"),
        m.root.glob("usr/local/Ascend/*/*/opp/built-in"),
    ):
        for folder in kernels:
            shutil.rmtree(folder, ignore_errors=True)


def no_toolkit(m):
    (m.root / "usr/local/Ascend/cann").unlink()
    (m.root / "usr/local/Ascend/cann-9.1.0").rename(m.root / "elsewhere")
    m.environ.clear()


BREAKS = {
    "Python": (lambda m: setattr(m, "version_of_python", "3.8.10"), "make setup PYTHON=python3.11"),
    "packages": (packages(onnxruntime=None), "make setup"),
    "torch": (packages(torch="2.1.0", torch_npu="2.1.0"), "pip install 'torch==2.13.*'"),
    "device files": (drop("dev/devmm_svm"), "--device /dev/devmm_svm"),
    "driver": (drop("usr/local/Ascend/driver/version.info"), "sudo ./Ascend-hdk-910b-npu-driver_"),
    "firmware": (
        lambda m: machines.write(
            m.root / "usr/local/Ascend/firmware/version.info", "Version=6.4.0.1\n"
        ),
        "npu-firmware_",
    ),
    "npu-smi": (
        answer("smi", 127, "npu-smi is not there"),
        "-v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi",
    ),
    "npu-smi fails": (
        answer("smi", 1, "dcmi module initialize failed. ret is -8005"),
        "sudo usermod -aG HwHiAiUser",
    ),
    "npu 0 chip 0": (
        answer("smi", 0, machines.HBM.format(chip="910B4", health="Alarm", driver="25.5.0")),
        "npu-smi info -t health -i 0",
    ),
    "CANN toolkit": (no_toolkit, "./Ascend-cann-toolkit_<version>_linux-"),
    "environment": (lambda m: m.environ.clear(), "source {root}/usr/local/Ascend/cann/set_env.sh"),
    "environment moved": (
        environ(ASCEND_HOME_PATH="/opt/gone", ASCEND_TOOLKIT_HOME="/opt/gone"),
        "source {root}/usr/local/",
    ),
    "environment libraries": (
        environ(LD_LIBRARY_PATH="/usr/lib"),
        "source {root}/usr/local/Ascend/cann-9.1.0/set_env.sh",
    ),
    "environment operators": (
        environ(ASCEND_OPP_PATH=""),
        "source {root}/usr/local/Ascend/cann-9.1.0/set_env.sh",
    ),
    "environment mixed": (another_toolkit, "env -u LD_LIBRARY_PATH"),
    "CANN kernels": (no_kernels, "./Ascend-cann-910b-ops_9.1.0_linux-"),
    "torch_npu": (packages(torch_npu=None), "pip install torch_npu==2.13.0"),
    "torch_npu other": (packages(torch_npu="2.9.0"), "pip install torch_npu==2.13.0"),
    "torch_npu driver": (answer("npu", 1, "RuntimeError: aclrtSetDevice 507033"), "npu-smi info"),
    "torch_npu TLS": (
        answer(
            "npu", 1, "ImportError: /v/libgomp-4.so.1: cannot allocate memory in static TLS block"
        ),
        "export LD_PRELOAD=/v/libgomp-4.so.1",
    ),
    "torch_npu atb": (
        answer("npu", 1, "OSError: libatb.so: cannot open shared object file"),
        "source /usr/local/Ascend/nnal/atb/set_env.sh",
    ),
    "torch_npu symbol": (
        answer("npu", 1, "ImportError: libtorch_npu.so: undefined symbol: _ZN3c10"),
        "pip install torch_npu==2.13.0",
    ),
    "torch_npu hangs": (
        answer("npu", 124, "python gave no answer in 120 s"),
        "npu-smi info   # the driver",
    ),
    "ais_bench": (packages(aclruntime=None), "pip install "),
    "ais_bench library": (
        answer("om", 1, "ImportError: libascendcl.so: cannot open shared object file"),
        "source {root}/usr",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_one_thing_broken(here, what):
    breaks, line = BREAKS[what]
    breaks(here)
    found = broken(here)
    [name] = [name for name in found if what.startswith(name)]
    assert line.format(root=here.root) in found[name], found
    assert not checks.examine(here).passed


@pytest.mark.parametrize(("pair", "cann"), [("2.9.0", "9.1.0"), ("2.14.0", "9.1.0")])
def test_other_tested_pairs_of_torch_and_torch_npu(tmp_path, pair, cann):
    """They decode; that only one release exports encoders is a note."""
    machine = machines.machine(tmp_path, cann)
    machine.packages.update(torch=pair, torch_npu=pair)
    found = {check.name: check for check in checks.examine(machine).checks}
    assert found["torch"].found == f"{pair} decodes; only torch 2.13 converts"
    assert not broken(machine)


def test_the_torch_npu_that_goes_with_the_torch_that_is_here(here):
    here.packages.update(torch="2.9.0", torch_npu=None)
    assert broken(here) == {"torch_npu": "pip install torch_npu==2.9.0"}


def test_no_permission(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda node, mode: "davinci" not in str(node))
    assert broken(here)["device files"].startswith("sudo usermod -aG HwHiAiUser $USER")


def test_a_card_without_a_driver(tmp_path):
    card = tmp_path / "sys/bus/pci/devices/0000:c1:00.0"
    machines.write(card / "vendor", "0x19e5\n")
    machines.write(card / "class", "0x120000\n")
    bare = machines.StandIn(
        tmp_path,
        {},
        {"torch": "2.13.0"},
        {"smi": (127, ""), "torch": (0, "{}"), "npu": (1, ""), "om": (1, "")},
    )
    found = broken(bare)
    assert {
        "device files",
        "driver",
        "npu-smi",
        "CANN toolkit",
        "torch_npu",
        "ais_bench",
    } <= found.keys()
    machines.write(card / "class", "0x020000\n")  # a network card of the same maker
    assert checks.examine(bare).passed


# several CANN versions


@pytest.mark.parametrize(
    ("cann", "status"),
    [
        ("8.3.RC1", MISMATCH),
        ("9.0.0", MISMATCH),
        ("9.1.0", OK),
        ("9.2.0", WARNING),
    ],
)
def test_cann_beside_torch_npu(tmp_path, cann, status):
    found = {check.name: check for check in checks.examine(machines.machine(tmp_path, cann)).checks}
    assert found["torch_npu"].status == status
    if status != OK:
        assert f"released for CANN 9.1, here is {cann}" in found["torch_npu"].found
    assert (
        found["environment"].status
        == found["CANN kernels"].status
        == found["NNAL (ATB)"].status
        == OK
    )


def test_the_environment_chooses_among_toolkits(here):
    machines.toolkit(here.root, "8.3.RC1")
    found = {check.name: check for check in checks.examine(here).checks}["CANN toolkit"]
    assert (
        found.status == OK
        and found.found.startswith("9.1.0 in ")
        and "also here: 8.3.RC1" in found.found
    )
    here.environ.clear()  # nothing sourced: the newest
    assert cann.active_toolkit(here).version == "9.1.0"


def test_old_kernels_packages_have_another_name(tmp_path):
    old = machines.machine(tmp_path, "8.3.RC1", "310P3")
    no_kernels(old)
    assert broken(old)["CANN kernels"].startswith("./Ascend-cann-kernels-310p_8.3.RC1_linux-")


@pytest.mark.parametrize(("chip", "status"), [("310P3", MISSING), ("910B4", NOTE)])
def test_only_a_310p_needs_atb(tmp_path, chip, status):
    stand_in = machines.machine(tmp_path, chip=chip)
    (tmp_path / "usr/local/Ascend/nnal/atb/latest/version.info").unlink()
    del stand_in.environ["ATB_HOME_PATH"]
    assert {check.name: check.status for check in checks.examine(stand_in).checks}[
        "NNAL (ATB)"
    ] == status


def test_atb_of_another_cann(tmp_path):
    duo = machines.machine(tmp_path, chip="310P3")
    machines.write(
        tmp_path / "usr/local/Ascend/nnal/atb/latest/version.info", "Ascend-cann-atb : 8.3.RC1\n"
    )
    assert broken(duo)["NNAL (ATB)"].startswith("./Ascend-cann-nnal_9.1.0_linux-")


def test_a_chip_we_do_not_run(tmp_path):
    found = checks.examine(machines.machine(tmp_path, chip="910A"))
    assert found.passed and {c.status for c in found.checks if c.name.startswith("npu ")} == {
        WARNING
    }


# the command


def test_table_and_json(here, monkeypatch, capsys):
    here.environ["LD_LIBRARY_PATH"] = "/usr/lib"
    monkeypatch.setattr(host, "Host", lambda: here)
    assert run_command(doctor.main, []) == 3
    text = capsys.readouterr().out
    fix = f"source {here.root}/usr/local/Ascend/cann-9.1.0/set_env.sh"
    assert f"\nmismatch environment: {fix}\n" in text and "LD_LIBRARY_PATH=/usr/lib\n" in text
    assert text.endswith("to mend: environment\n")
    assert run_command(doctor.main, ["--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (
        not found["passed"]
        and found["devices"][0]["soc"] == "Ascend910B4"
        and found["environment"] == here.environ
    )
    assert [check["fix"] for check in found["checks"] if check["name"] == "environment"] == [fix]


def test_without_rich_the_table_is_plain(here, monkeypatch, capsys):
    monkeypatch.setattr(host, "Host", lambda: here)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run_command(doctor.main, []) == 0
    assert "driver        ok        26.0.rc1\n" in capsys.readouterr().out


def test_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "runtime.doctor", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["passed"] else 3) and done.stderr == ""
    assert found["npu"] or found["verdict"].startswith("CPU only: ") and done.returncode == 0


def test_torch_is_never_imported_by_the_doctor():
    code = (
        "import sys; from runtime.doctor import checks; checks.Host.run = lambda *command, timeout: (1, 'no')\n"
        "checks.examine(checks.Host()); sys.exit(bool({'torch', 'torch_npu'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_commands(tmp_path):
    assert Host().run("no-such-command-here") == (127, "no-such-command-here is not there")
    assert Host().run(sys.executable, "-c", "import time; time.sleep(9)", timeout=0.2)[0] == 124
    assert Host().run(sys.executable, "-c", "import sys; print(1); sys.exit(3)") == (3, "1\n")
