"""Writes build.ninja for the operator library and the pybind11 module, and runs it.

Options come from the environment; `python -m densenet_efficient info` shows what was built:

    MAX_JOBS                     parallel compilations (default: by the cores)
    CXX                          C++ compiler
    DENSENET_EFFICIENT_MARCH     -march of the CPU kernels (default native; none: no flag)
    DENSENET_EFFICIENT_CUDA      1: CUDA kernels or an error; 0: leave them out (default: compiled
                                 where nvcc is found, left out with a warning where they fail)
    CUDA_HOME                    which nvcc
    TORCH_CUDA_ARCH_LIST         which GPU architectures
    DENSENET_EFFICIENT_DEBUG     1: assertions and symbols, little optimisation
    DENSENET_EFFICIENT_SANITIZE  e.g. address or address,undefined, for the host code
    DENSENET_EFFICIENT_TORCH     the folder that contains torch, where it is not found by itself
"""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import toolchain

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the library runs with this torch and newer


@dataclass(frozen=True)
class Built:
    library: Path
    module: Path


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


class NinjaFile:
    """build.ninja, line by line; a file that has not changed is not written again."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str, **variables: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def build(
        self, output: Path, rule: str, inputs: list[Path], needs: tuple[Path, ...] = ()
    ) -> Path:
        line = f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}"
        if needs:
            line += " | " + " ".join(map(escape, needs))
        self.lines.append(line)
        return output

    def phony(self, name: str, inputs: list[Path]) -> None:
        self.lines.append(f"build {name}: phony {' '.join(map(escape, inputs))}")

    def write(self, path: Path) -> None:
        write_if_changed(path, "\n".join(self.lines) + "\n")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(argument: object) -> str:
    """An argument for the shell inside a ninja command."""
    text = str(argument).replace("$", "$$")
    return text if all(c.isalnum() or c in "-_=+./,:$%" for c in text) else f"'{text}'"


def join(arguments: Sequence[object]) -> str:
    return " ".join(map(quote, arguments))


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


class Build:
    """One build of both artefacts under ROOT/build/native*."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self.options = Options.from_environment()
        self.torch = toolchain.find_torch()
        self.ninja = toolchain.find_ninja()
        self.compiler = toolchain.find_compiler()
        self.folder = root / "build" / self.options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.host_sources = [root / "csrc/ops.cpp", *sorted((root / "csrc/cpu").rglob("*.cpp"))]
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
        self.ninja_run("module")
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
        host_objects = self.host_rules(ninja)
        cuda_objects = self.cuda_rules(ninja, self.nvcc) if self.nvcc else []
        library = ninja.build(
            self.folder / "libdensenet_efficient.so", "link", [*host_objects, *cuda_objects]
        )
        module = self.module_rules(ninja)
        ninja.phony("host", host_objects)
        ninja.phony("cuda", cuda_objects)
        ninja.phony("library", [library])
        ninja.phony("module", [module])
        ninja.write(self.folder / "build.ninja")
        return Built(library, module)

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

    def host_rules(self, ninja: NinjaFile) -> list[Path]:
        march = [f"-march={self.compiler.march}"] if self.compiler.march else []
        command = [self.compiler.path, *self.host_flags(), *march, *self.library_flags()]
        ninja.rule(
            "cxx",
            f"{join(command)} -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="C++ $in",
        )
        # cudart is linked statically; hidden, so that it never meets the copy that torch brings.
        link = ["-shared", f"-L{self.torch.lib}", "-ltorch_cpu", "-lpthread", "-ldl"]
        linker_options = ["-z", "defs", "--exclude-libs", "ALL"]
        if self.nvcc:
            options = [word for option in linker_options for word in ("-Xlinker", option)]
            command = [self.nvcc.path, *self.ccbin(), "-cudart", "static", *options]
        else:
            options = [f"-Wl,{','.join(linker_options)}"]
            command = [self.compiler.path, *options]
        for sanitizer in filter(None, self.options.sanitize.split(",")):
            command += ["-Xcompiler"] if self.nvcc else []
            command += [f"-fsanitize={sanitizer}"]
        ninja.rule("link", f"{join(command)} -o $out $in {join(link)}", description="link $out")
        return [
            ninja.build(self.folder / "host" / f"{source.name}.o", "cxx", [source])
            for source in self.host_sources
        ]

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

    def module_rules(self, ninja: NinjaFile) -> Path:
        includes: list[object] = ["-I", self.root / "csrc", "-I", self.folder]
        for folder in (toolchain.find_pybind11(self.torch), sysconfig.get_path("include")):
            includes += ["-isystem", folder]
        # No -march: this module must run on the CPU that lacks what the library needs, to say so.
        flags: list[object] = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-O1", "-DNDEBUG"]
        ninja.rule(
            "module",
            f"{join([self.compiler.path, *flags, *includes])} -shared -MMD -MF $out.d $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="C++ $in",
        )
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return ninja.build(
            self.folder / f"_module{suffix}",
            "module",
            [self.root / "csrc/module.cpp"],
            (self.folder / "build_info.h",),
        )

    def build_info(self, library: Path) -> str:
        """The header that module.cpp turns into densenet_efficient._module.build_info()."""
        built = float(os.environ.get("SOURCE_DATE_EPOCH", library.stat().st_mtime))
        rows = {
            "version": self.version,
            "commit": self.commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built)),
            "torch": self.torch.version,
            "compiler": self.compiler.version,
            "machine": platform.machine(),
            "march": self.compiler.march,
            "cpu_features": " ".join(self.compiler.features),
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
    """Builds (or brings up to date) both artefacts; SystemExit with a message where it cannot."""
    return Build(root, version).run()
