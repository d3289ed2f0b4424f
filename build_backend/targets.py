"""What one build serves: the processors its CPU kernels are compiled for, and the Pythons that its
module is compiled for."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import toolchain

# What DENSENET_EFFICIENT_MARCH=portable stands for, by machine, the least demanding first. The
# products of bfloat16 have an instruction of their own in AVX512_BF16, which no level includes; on
# Arm nothing in the kernels depends on more than the first architecture of 64 bits.
PORTABLE = {
    "x86_64": ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4+avx512bf16"),
    "aarch64": ("armv8-a",),
}

# Compiler macro -> the name of that feature in /proc/cpuinfo.
CPU_FEATURES = {
    "__SSE4_2__": "sse4_2",
    "__POPCNT__": "popcnt",
    "__MOVBE__": "movbe",
    "__AVX__": "avx",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__LZCNT__": "abm",
    "__AVX2__": "avx2",
    "__GFNI__": "gfni",
    "__VAES__": "vaes",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512CD__": "avx512cd",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AMX_TILE__": "amx_tile",
    "__AMX_BF16__": "amx_bf16",
    "__ARM_FEATURE_ATOMICS": "atomics",
    "__ARM_FEATURE_DOTPROD": "asimddp",
    "__ARM_FEATURE_BF16": "bf16",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
}


@dataclass(frozen=True)
class Variant:
    """CPU kernels for one kind of processor, a library of their own."""

    name: str  # of the library too
    flags: tuple[str, ...]
    features: tuple[str, ...]  # what the flags make the compiler assume, as /proc/cpuinfo says it


@dataclass(frozen=True)
class Interpreter:
    """A Python that the module is compiled for."""

    tag: str  # cp312
    include: str
    suffix: str  # of the module's file


def variants(compiler: toolchain.Compiler) -> tuple[Variant, ...]:
    """Those that DENSENET_EFFICIENT_MARCH asks for, the least demanding first; at run time the last
    that the processor can run is loaded.

    The variable holds values of -march, separated by spaces, commas or semicolons; on x86 further
    extensions follow a "+", as they do on Arm. `native` (the default) is this machine, `none` the
    compiler's default, `portable` what a wheel holds.
    """
    text = os.environ.get("DENSENET_EFFICIENT_MARCH") or "native"
    names = [name for name in re.split(r"[\s,;]+", text.strip()) if name]
    machine = platform.machine()
    if names == ["portable"]:
        names = list(PORTABLE.get(machine, ("none",)))
    if names == ["native"] and compile_macros(compiler, ["-march=native"]).returncode:
        names = ["none"]  # some compilers for Arm know no "native"
    return tuple(variant(compiler, name, machine) for name in dict.fromkeys(names))


def variant(compiler: toolchain.Compiler, name: str, machine: str) -> Variant:
    flags: list[str] = []
    if name != "none" and machine in ("x86_64", "AMD64", "i686"):
        march, *extensions = name.split("+")
        flags = [f"-march={march}", *(f"-m{extension}" for extension in extensions)]
    elif name != "none":
        flags = [f"-march={name}"]
    macros = compile_macros(compiler, flags)
    if macros.returncode:
        raise toolchain.BuildError(
            f"densenet-efficient needs a C++20 compiler, and {compiler.path} ({compiler.version}) "
            f"refuses -std=c++20 {' '.join(flags)}: {macros.stderr.strip()}. Install a newer one "
            "(GCC 12 is what is tested), name it in CXX, or correct DENSENET_EFFICIENT_MARCH, then "
            "run this command again."
        )
    defined = {line.split()[1] for line in macros.stdout.splitlines() if line.count(" ") >= 1}
    features = tuple(name for macro, name in CPU_FEATURES.items() if macro in defined)
    return Variant(name, tuple(flags), features)


def compile_macros(
    compiler: toolchain.Compiler, flags: list[str]
) -> subprocess.CompletedProcess[str]:
    """The compiler's own macros under these flags."""
    command = [compiler.path, "-std=c++20", *flags, "-dM", "-E", "-x", "c++", os.devnull]
    return toolchain.run(command)


def interpreters() -> tuple[Interpreter, ...]:
    """Those that DENSENET_EFFICIENT_PYTHONS names (programs, separated as in PATH); the running one
    where it names none."""
    named = [p for p in os.environ.get("DENSENET_EFFICIENT_PYTHONS", "").split(os.pathsep) if p]
    found = (ask(program) for program in named or [sys.executable])
    return tuple({interpreter.suffix: interpreter for interpreter in found}.values())


def wheel_tag(python: str, abi: str) -> tuple[str, str]:
    """The Pythons and the ABI in the tag of a wheel: those given, which are the running one's, or
    all that the module is compiled for; the libraries belong to none."""
    tags = sorted(interpreter.tag for interpreter in interpreters())
    return (python, abi) if len(tags) == 1 else (".".join(tags), "none")


def ask(program: str) -> Interpreter:
    code = (
        "import json, sys, sysconfig as s; print(json.dumps(['cp%d%d' % sys.version_info[:2], "
        "s.get_path('include'), s.get_config_var('EXT_SUFFIX')]))"
    )
    path = shutil.which(program)
    answer = toolchain.run([path, "-c", code]) if path else None
    if answer is None or answer.returncode:
        raise toolchain.BuildError(
            f"DENSENET_EFFICIENT_PYTHONS names {program}, which "
            f"{'cannot be found' if answer is None else 'does not run: ' + answer.stderr.strip()}. "
            "It must hold Python programs, separated as in PATH."
        )
    return Interpreter(*json.loads(answer.stdout))
