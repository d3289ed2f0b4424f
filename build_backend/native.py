"""Writes build.ninja for the operator libraries and the pybind11 module, and runs it.

    libdensenet_efficient.so            the schemas, and the CUDA kernels where they are compiled
    libdensenet_efficient_VARIANT.so    the CPU kernels for one kind of processor (targets.py)
    _module.SUFFIX                      the module, for one Python

The libraries know nothing of Python.

Options come from the environment; `python -m densenet_efficient info` shows what was built:

    MAX_JOBS                     parallel compilations (default: by the cores)
    CXX                          C++ compiler
    DENSENET_EFFICIENT_MARCH     -march of the CPU kernels (default native; none: no flag), or
                                 several; portable: those of a wheel
    DENSENET_EFFICIENT_PYTHONS   the Pythons of the module (default: the running one)
    DENSENET_EFFICIENT_CUDA      1: CUDA kernels or an error; 0: leave them out (default: compiled
                                 where torch has CUDA and nvcc is found, left out with a warning
                                 where they fail)
    CUDA_HOME                    which nvcc
    TORCH_CUDA_ARCH_LIST         which GPU architectures
    DENSENET_EFFICIENT_DEBUG     1: assertions and symbols, little optimisation
    DENSENET_EFFICIENT_SANITIZE  e.g. address or address,undefined, for the host code
    DENSENET_EFFICIENT_TORCH     the folder that contains torch, where it is not found by itself
"""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import targets
import toolchain
from ninja_file import NinjaFile, join, write_if_changed

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the library runs with this torch and newer


@dataclass(frozen=True)
class Built:
    library: Path
    kernels: tuple[Path, ...]  # the CPU kernels, a library for each variant
    modules: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.library, *self.kernels, *self.modules)


@dataclass(frozen=True)
class Options:
    """What the environment asks for."""

    debug: bool
    sanitize: str
    cuda: str  # "1", "0" or "" (compile where possible)
    jobs: str

    @classmethod
    def from_environment(cls) -> Options:
        def switch(name: str) -> str:
            value = os.environ.get(name, "")
            if value not in ("", "0", "1"):
                raise toolchain.BuildError(f"{name} must be 0 or 1, got {value!r}.")
            return value

        return cls(
            debug=switch("DENSENET_EFFICIENT_DEBUG") == "1",
            sanitize=os.environ.get("DENSENET_EFFICIENT_SANITIZE", ""),
            cuda=switch("DENSENET_EFFICIENT_CUDA"),
            jobs=os.environ.get("MAX_JOBS", ""),
        )

    @property
    def folder(self) -> str:
        parts = ["native", "debug" if self.debug else "", self.sanitize.replace(",", "-")]
        return "-".join(part for part in parts if part)


class Build:
    """One build of all artefacts under ROOT/build/native*."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self.options = Options.from_environment()
        self.torch = toolchain.find_torch()
        self.ninja = toolchain.find_ninja()
        self.compiler = toolchain.find_compiler()
        self.variants = targets.variants(self.compiler)
        self.interpreters = targets.interpreters()
        self.folder = root / "build" / self.options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cpu_sources = sorted((root / "csrc/cpu").rglob("*.cpp"))
        self.cuda_sources = sorted((root / "csrc/cuda").glob("*.cu"))
        self.nvcc, self.cuda_status = self.choose_cuda()
        self.archs = toolchain.CudaArchs((), ())
        if self.nvcc is not None:
            wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
            self.archs = toolchain.parse_cuda_archs(wanted or toolchain.DEFAULT_CUDA_ARCHS)

    def choose_cuda(self) -> tuple[toolchain.Nvcc | None, str]:
        """nvcc where CUDA kernels are to be compiled, and in words what became of them."""
        if self.options.cuda == "0":
            return None, "left out (DENSENET_EFFICIENT_CUDA=0)"
        if not self.cuda_sources:
            return None, "left out (the sources hold none)"
        if not self.options.cuda and not self.torch.cuda:
            return None, (
                f"left out (torch {self.torch.version} has no CUDA; DENSENET_EFFICIENT_CUDA=1 "
                "compiles them all the same)"
            )
        nvcc = toolchain.find_nvcc()
        if nvcc is not None:
            return nvcc, "compiled"
        if self.options.cuda == "1":
            raise toolchain.BuildError(
                "DENSENET_EFFICIENT_CUDA=1 asks for the CUDA kernels, and nvcc was not found in "
                "CUDA_HOME, on PATH or in /usr/local/cuda. Install the CUDA toolkit, or set "
                "CUDA_HOME, then run this command again."
            )
        return None, "left out (nvcc was not found when the library was built)"

    def run(self) -> Built:
        with open(self.folder / "lock", "w") as lock:  # two builds of one tree take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self.run_locked()

    def run_locked(self) -> Built:
        built = self.write_ninja()
        self.ninja_run("host")
        if self.nvcc is not None:
            try:
                self.ninja_run("cuda")
            except subprocess.CalledProcessError:
                if self.options.cuda == "1":
                    raise toolchain.BuildError(
                        "The CUDA kernels failed to compile (see above), and "
                        "DENSENET_EFFICIENT_CUDA=1 makes that an error."
                    ) from None
                self.leave_cuda_out()
                built = self.write_ninja()
        self.ninja_run("library")
        write_if_changed(self.folder / "build_info.h", self.build_info(built.library))
        self.ninja_run("modules")
        return built

    def leave_cuda_out(self) -> None:
        assert self.nvcc is not None
        self.cuda_status = f"left out (nvcc {self.nvcc.version} failed to compile them)"
        self.nvcc, self.archs = None, toolchain.CudaArchs((), ())
        bar = "*" * 80
        print(
            f"{bar}\nWARNING: the CUDA kernels failed to compile (see above). Building for the CPU "
            "only: CUDA\ntensors will take the fallback. DENSENET_EFFICIENT_CUDA=1 makes this "
            f"an error.\n{bar}",
            file=sys.stderr,
            flush=True,
        )

    def ninja_run(self, target: str) -> None:
        jobs = ["-j", self.options.jobs] if self.options.jobs else []
        command = [self.ninja, *jobs, target]
        # A dry run first: "no work to do", once for every phase of every command, is only noise.
        planned = subprocess.run(
            [*command, "-n"], cwd=self.folder, capture_output=True, text=True
        ).stdout
        if "no work to do" in planned:
            return
        try:
            subprocess.run(command, cwd=self.folder, check=True)
        except subprocess.CalledProcessError:
            if target == "cuda":
                raise
            raise toolchain.BuildError(
                f"densenet-efficient failed to compile with {self.compiler.version} against torch "
                f"{self.torch.version}; the compiler's messages are above."
            ) from None

    def write_ninja(self) -> Built:
        ninja = NinjaFile()
        self.host_rules(ninja)
        common = [
            self.host_object(ninja, source, "host", ())
            for source in sorted((self.root / "csrc").glob("*.cpp"))
            if source.name != "module.cpp"
        ]
        kernels = {
            variant.name: [
                self.host_object(ninja, source, f"cpu/{variant.name}", variant.flags)
                for source in self.cpu_sources
            ]
            for variant in self.variants
        }
        cuda_objects = self.cuda_rules(ninja, self.nvcc) if self.nvcc else []
        built = Built(
            ninja.build(
                self.folder / "libdensenet_efficient.so",
                "link_cuda" if self.nvcc else "link",
                [*common, *cuda_objects],
            ),
            tuple(
                ninja.build(self.folder / f"libdensenet_efficient_{name}.so", "link", objects)
                for name, objects in kernels.items()
            ),
            self.module_rules(ninja),
        )
        ninja.phony("host", [*common, *itertools.chain(*kernels.values())])
        ninja.phony("cuda", cuda_objects)
        ninja.phony("library", [built.library, *built.kernels])
        ninja.phony("modules", list(built.modules))
        ninja.write(self.folder / "build.ninja")
        return built

    def host_flags(self) -> list[object]:
        flags: list[object] = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # GCC 12 warns of its own vector headers, at length.
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        flags += ["-O1", "-g"] if self.options.debug else ["-O3", "-DNDEBUG"]
        if self.options.sanitize:
            flags += [f"-fsanitize={self.options.sanitize}", "-fno-omit-frame-pointer", "-g"]
        return flags

    def library_flags(self) -> list[object]:
        includes = ["-I", self.root / "csrc", "-isystem", self.torch.include]
        return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *includes]

    def host_rules(self, ninja: NinjaFile) -> None:
        command = [self.compiler.path, *self.host_flags(), *self.library_flags()]
        ninja.rule(
            "cxx",
            f"{join(command)} $target -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="C++ $in $target",
        )
        sanitizers = [f"-fsanitize={name}" for name in self.options.sanitize.split(",") if name]
        options = ["-z", "defs", "--exclude-libs", "ALL"]
        link = ["-shared", f"-L{self.torch.lib}", "-ltorch_cpu", "-lpthread", "-ldl"]
        command = [self.compiler.path, f"-Wl,{','.join(options)}", *sanitizers]
        ninja.rule("link", f"{join(command)} -o $out $in {join(link)}", description="link $out")
        if self.nvcc:
            # cudart is linked statically; hidden, so that it never meets the copy of torch.
            words = [word for option in options for word in ("-Xlinker", option)]
            words += [word for option in sanitizers for word in ("-Xcompiler", option)]
            command = [self.nvcc.path, *map(str, self.ccbin()), "-cudart", "static", *words]
            ninja.rule(
                "link_cuda", f"{join(command)} -o $out $in {join(link)}", description="link $out"
            )

    def host_object(
        self, ninja: NinjaFile, source: Path, folder: str, flags: tuple[str, ...]
    ) -> Path:
        output = self.folder / folder / f"{source.name}.o"
        return ninja.build(output, "cxx", [source], target=join(flags))

    def ccbin(self) -> list[object]:
        return [] if os.environ.get("NVCC_CCBIN") else ["-ccbin", self.compiler.path]

    def cuda_rules(self, ninja: NinjaFile, nvcc: toolchain.Nvcc) -> list[Path]:
        wrapper = self.root / "build_backend" / "nvcc.py"
        flags: list[object] = ["-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-lineinfo"]
        flags += ["-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *self.archs.flags()]
        flags += [] if self.options.debug else ["-DNDEBUG"]
        # The shim declares the current stream only under USE_CUDA.
        flags += ["-DUSE_CUDA", *self.library_flags(), *self.ccbin()]
        command = [sys.executable, wrapper, "$out.ptxas", "--", nvcc.path, *flags]
        ninja.rule(
            "nvcc",
            f"{join(command).replace('$$out', '$out')} -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="nvcc $in",
        )
        return [
            ninja.build(self.folder / "cuda" / f"{source.name}.o", "nvcc", [source], (wrapper,))
            for source in self.cuda_sources
        ]

    def module_rules(self, ninja: NinjaFile) -> tuple[Path, ...]:
        includes: list[object] = ["-I", self.root / "csrc", "-I", self.folder]
        includes += ["-isystem", toolchain.find_pybind11(self.torch)]
        # No -march: this module must run on the CPU that lacks what the kernels need, to say so.
        flags: list[object] = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-O2", "-DNDEBUG"]
        command = join([self.compiler.path, *flags, *includes])
        ninja.rule(
            "module",
            f"{command} $python -shared -MMD -MF $out.d $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="C++ $in",
        )
        return tuple(
            ninja.build(
                self.folder / f"_module{interpreter.suffix}",
                "module",
                [self.root / "csrc/module.cpp"],
                (self.folder / "build_info.h",),
                python=join(["-isystem", interpreter.include]),
            )
            for interpreter in self.interpreters
        )

    def build_info(self, library: Path) -> str:
        """The header that module.cpp turns into densenet_efficient._module.build_info(). Features
        are those of the variants of "march", in order, separated by semicolons."""
        built = float(os.environ.get("SOURCE_DATE_EPOCH", library.stat().st_mtime))
        rows = {
            "version": self.version,
            "commit": self.commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built)),
            "torch": self.torch.version,
            "compiler": self.compiler.version,
            "machine": platform.machine(),
            "march": " ".join(variant.name for variant in self.variants),
            "cpu_features": "; ".join(" ".join(v.features) for v in self.variants),
            "debug": "1" if self.options.debug else "",
            "sanitize": self.options.sanitize,
            "cuda": self.cuda_status,
            "cuda_archs": " ".join(self.archs.code),
            "cuda_ptx": " ".join(self.archs.ptx),
            "nvcc": self.nvcc.version if self.nvcc else "",
        }
        return "".join(f'{{"{key}", {c_string(rows[key])}}},\n' for key in rows)

    def commit(self) -> str:
        """The commit of the sources, with "+" where csrc differs; "" outside a repository."""
        git = ["git", "-C", str(self.root)]
        try:
            if toolchain.run([*git, "ls-files", "--error-unmatch", "csrc/ops.cpp"]).returncode:
                return ""
            head = toolchain.run([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
            changed = toolchain.run([*git, "diff", "--quiet", "HEAD", "--", "csrc"]).returncode
        except FileNotFoundError:
            return ""
        return head + ("+" if changed else "")


def c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def build(root: Path, version: str) -> Built:
    """Builds (or brings up to date) all artefacts; SystemExit with a message where it cannot."""
    return Build(root, version).run()
