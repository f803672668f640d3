"""The same bytes on any x86-64 processor: what is pinned, when, and what the user's own settings do."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shrunk import METRICS, MODELS, ROOT, SHRUNK, write_params

import pipeline
from pipeline.core.compute import deterministic_device
from pipeline.core.processes import cpus
from pipeline.evidence import provenance

AVX2 = "avx2" in Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else False
INSTRUCTIONS = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"
}  # fmt: skip


TWO = "run: {profile: chosen}\nprofiles: {a: {threads: 3}, b: {threads: 4}}"


def found_by(code: str, folder: Path, **environment: str) -> Any:
    """What `code` prints as JSON on its last line, in a fresh process, without the pins of this one."""
    set_here = {*pipeline.PINS, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    clean = {name: value for name, value in os.environ.items() if name not in set_here}
    clean |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=folder, env=clean, text=True)
    return json.loads(printed.splitlines()[-1])


def test_the_package_pins_before_torch_and_leaves_what_the_user_set() -> None:
    code = "import json, os, sys, pipeline; print(json.dumps([dict(os.environ), 'numpy' in sys.modules]))"
    for own in ({}, {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "7"}):
        environment, numpy = found_by(code, ROOT, **own)
        assert not numpy
        assert {name: environment.get(name) for name in pipeline.PINS} == pipeline.PINS | own


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("passive", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
def test_waiting_threads_spin_shortly_and_then_sleep(own: dict, expected: tuple) -> None:
    code = "import json, os, pipeline; print(json.dumps(dict(os.environ)))"
    environment = found_by(code, ROOT, **own)
    assert (environment["OMP_WAIT_POLICY"], environment.get("GOMP_SPINCOUNT")) == expected


@pytest.mark.slow
@pytest.mark.skipif(not AVX2, reason="this processor has no AVX2, so no instructions are pinned")
def test_the_libraries_obey() -> None:
    code = (
        "import json, pipeline, numpy, threadpoolctl, torch; print(json.dumps([torch.backends.cpu.get_cpu_capability(),"
        " torch.get_num_threads(), threadpoolctl.threadpool_info()]))"
    )
    capability, threads, libraries = found_by(code, ROOT)
    assert (capability, threads) == ("AVX2", 2)
    (openblas,) = [library for library in libraries if library["internal_api"] == "openblas"]
    assert (openblas["architecture"], openblas["num_threads"]) == ("Haswell", min(2, cpus()))  # no more than cores


@pytest.mark.parametrize(
    ("flags", "content", "expected"),
    [
        ("fpu avx avx2 fma", TWO.replace("chosen", "a"), {"OMP_NUM_THREADS": "3"}),
        ("fpu avx", TWO.replace("chosen", "b"), {"OMP_NUM_THREADS": "4"}),
        ("fpu avx avx2_not", "run: {profile: c}\nprofiles: {a: {threads: 3}}", {}),
        ("fpu avx2", "profiles: [", {}),
        ("fpu avx2", "run: 3", {}),
        ("fpu avx2", None, {}),
        (None, None, {}),
    ],
)
def test_a_processor_without_avx2_and_faulty_parameters_are_left_alone(
    flags: str | None, content: str | None, expected: dict[str, str], tmp_path: Path
) -> None:
    processor, parameters = tmp_path / "cpuinfo", tmp_path / "params.yaml"
    if flags is not None:
        processor.write_text(f"model\t: 1\nflags\t\t: {flags}\n")
    if content is not None:
        parameters.write_text(content)
    instructions = INSTRUCTIONS if flags is not None and "avx2" in flags.split() else {}
    assert pipeline.pins(processor, parameters) == instructions | expected


def test_what_the_user_overrides_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pipeline, "PINS", pipeline.PINS)
    for name, value in pipeline.PINS.items():
        monkeypatch.setenv(name, value)
    deterministic_device()
    assert capsys.readouterr().err == ""
    name, value = next(iter(pipeline.PINS.items()))
    monkeypatch.setenv(name, "another")
    deterministic_device()
    assert f"the environment sets {name}=another (pinned: {value})" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return memory by other rules")
def test_memory_of_one_step_is_kept_for_the_next(tmp_path: Path) -> None:
    """16 tensors of 1 MB a step are 4096 pages, which glibc alone returns after each step and faults in again."""
    code = """
import json, resource, torch
from pipeline.core.compute import deterministic_device
deterministic_device()
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 18) for _ in range(16)]
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""
    assert max(found_by(code, tmp_path)[2:]) < 400


def test_provenance_tells_what_decides_the_bytes() -> None:
    found = provenance.hardware()
    assert found["threads"] == str(torch.get_num_threads())
    assert found["instruction set in use"] == torch.backends.cpu.get_cpu_capability()
    assert {"pinned", "BLAS", "processor"} <= found.keys()
    assert "openblas" in found["BLAS"]
    if Path("/proc/cpuinfo").exists():
        assert all(word in found["processor"] for word in ("family", "model", "stepping"))


def test_the_report_has_the_times_of_stages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    names = ("train@mini-diva", "plan", "sweep --seeds 1..5", "reference", "report --show", "experiment")
    lines = [json.dumps({"stage": name, "seconds": 2, "peak_memory_mb": 3, "finished": "now"}) for name in names]
    Path("metrics/timings.jsonl").write_text("\n".join(lines))
    assert provenance.times() == dict.fromkeys(("train@mini-diva", "plan"), "2 s, 3 MB, now")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its cores")
def test_training_makes_the_same_bytes_on_one_core_and_on_two_from_any_folder(here: Path, tmp_path: Path) -> None:
    write_params(**SHRUNK)
    cores = sorted(os.sched_getaffinity(0))
    made = []
    for which, visible in (("one core", cores[:1]), ("all cores", cores)):
        folder = tmp_path / which
        shutil.copytree(here, folder)
        code = f"import os, json, sys; os.sched_setaffinity(0, {visible}); sys.argv[1:] = ['mini', 'diva']\n"
        code += "from pipeline import train; train.main(); import torch; print(json.dumps(torch.get_num_threads()))"
        assert found_by(code, folder) == 2
        made.append((folder / MODELS / "diva/mini/open_clip_model.safetensors").read_bytes())
        assert load_file(folder / MODELS / "diva/mini/open_clip_model.safetensors")
        assert (folder / METRICS / "train/mini-diva/metrics.json").is_file()
    assert made[0] == made[1]
