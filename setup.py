"""Builds the C++ and CUDA libraries; everything else is declared in pyproject.toml.

PCOHERENCE_NO_EXTENSION=1 installs the Python files alone: the reference needs no compiler.
PCOHERENCE_CUDA=1 makes it an error that the CUDA library cannot be built, 0 leaves it out.
TORCH_CUDA_ARCH_LIST chooses the GPUs that it is compiled for.

What is installed are plain shared libraries on torch's stable ABI: one wheel serves every Python
and every torch from 2.11 on. In the checkout (editable installs, build_ext --inplace) there is one
module for Python beside them, the row kernels for tests.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# The oldest torch whose stable ABI is used: 2.11.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # debug information would make the binary twenty times larger
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # fused multiply-add where the instruction set has it
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Werror=switch",  # a new metric, objective or method must be treated everywhere
    "-Wno-psabi",  # vectors wider than the baseline's registers are only passed within one file
    "-Wno-unknown-pragmas",
]

CPU_LIBRARY, CUDA_LIBRARY = "pcoherence.libpcoherence_cpu", "pcoherence.libpcoherence_cuda"
ROW_KERNELS = "pcoherence._C"
BINDINGS = "csrc/cpu/bindings.cpp"

CUDA_SOURCES = [
    "csrc/tables.cpp",
    "csrc/cuda/launch_float.cu",
    "csrc/cuda/launch_double.cu",
    "csrc/cuda/device.cpp",
    "csrc/cuda/ops.cpp",
]
CUDA_MACROS = [STABLE_ABI, ("USE_CUDA", None)]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads=4"]
CAPABILITIES = "8.0;9.0;10.0+PTX"


def headers():
    """What a change of rebuilds everything."""
    return sorted(str(path) for path in Path("csrc").rglob("*.[hi]*"))


def cpu_sources():
    """Files of the CPU library."""
    found = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    return ["csrc/tables.cpp", *(path for path in found if path != BINDINGS)]


def cpu_library():
    """The CPU kernels, their operators and what they say of themselves."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing(error) from error
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        CPU_LIBRARY,
        cpu_sources(),
        define_macros=[STABLE_ABI],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=headers(),
        py_limited_api=True,  # nothing of torch's Python library
    )


def missing(error):
    """What to say of a package that is needed."""
    return SystemExit(
        f"pcoherence: building the libraries needs {error.name}; install torch>=2.11 and "
        "'pybind11>=3' first (and use --no-build-isolation), or set PCOHERENCE_NO_EXTENSION=1"
    )


def pybind11_headers():
    """Where they are."""
    try:
        import pybind11
    except ImportError as error:
        raise missing(error) from error
    return pybind11.get_include()


def row_kernels():
    """The row kernels as a module of Python, which links with the CPU library."""
    return Extension(ROW_KERNELS, [BINDINGS], depends=headers(), language="c++")


def defines(macros):
    """As the compiler takes them."""
    return [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros]


def architectures(capabilities):
    """Options of nvcc for a list like "8.0;9.0+PTX"."""
    options = []
    for entry in re.split(r"[;\s]+", capabilities.strip()):
        number, _, ptx = entry.partition("+")
        if not re.fullmatch(r"\d+\.\d[a-z]?", number) or ptx not in ("", "PTX"):
            raise SystemExit(
                f"pcoherence: TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX; "
                f"got {entry!r}"
            )
        sm = number.replace(".", "")
        codes = f"[sm_{sm},compute_{sm}]" if ptx else f"sm_{sm}"
        options += ["-gencode", f"arch=compute_{sm},code={codes}"]
    return options


def finished(jobs):
    """Run commands side by side; the failure of one ends all of this."""
    running = [subprocess.Popen(job) for job in jobs]
    failed = [job for job, process in zip(jobs, running) if process.wait() != 0]  # noqa: B905
    if failed:
        raise SystemExit(f"pcoherence: failed: {shlex.join(map(str, failed[0]))}")


def build_cuda(output, work, capabilities):
    """Compile and link the CUDA library, whether this torch has CUDA or not.

    What it needs of libtorch_cuda is found when it is loaded: a stub of that name stands in for
    it, so that the loader will look there. CUDA's runtime is part of it.
    """
    import torch

    root = Path(torch.__file__).parent
    work.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", *NVCC_FLAGS, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    cxx = [os.environ.get("CXX", "g++"), *CXX_FLAGS, "-fPIC"]
    cxx += [*defines(CUDA_MACROS), f"-I{root / 'include'}"]
    # The headers of CUDA, where nvcc finds them.
    asked = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(asked, capture_output=True, text=True).stderr
    cxx += re.findall(r'"(-I[^"]+)"', told)
    jobs, objects = [], []
    for source in CUDA_SOURCES:
        objects.append(str(work / f"{Path(source).stem}.o"))
        compiler = [*nvcc, *architectures(capabilities)] if source.endswith(".cu") else cxx
        jobs.append([*compiler, "-c", source, "-o", objects[-1]])
    finished(jobs)
    stub, nothing = work / "libtorch_cuda.so", work / "stub.cpp"
    nothing.write_text('extern "C" void pcoherence_stub() {}\n')
    soname = "-Wl,-soname,libtorch_cuda.so"
    finished([[cxx[0], "-shared", "-fPIC", soname, str(nothing), "-o", str(stub)]])
    libraries = [f"-L{work}", f"-L{root / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    link = ["nvcc", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    link += ["-Xlinker", "--no-as-needed", *objects, *libraries, "-o", str(output)]
    finished([link])


def wants_cuda(development):
    """Whether the CUDA library is built: in the checkout for a torch that has CUDA, else always.

    That it cannot be is said, or is an error.
    """
    import torch

    wanted = os.environ.get("PCOHERENCE_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"pcoherence: PCOHERENCE_CUDA: expected 0 or 1; got {wanted!r}")
    if wanted == "0" or (wanted is None and development and torch.version.cuda is None):
        return False
    if shutil.which("nvcc"):
        return True
    message = "pcoherence: the CUDA library cannot be built: there is no nvcc on PATH"
    if wanted == "1":
        raise SystemExit(message)
    print(f"{message}; backend 'cuda' will not be there", file=sys.stderr)
    return False


def commands():
    """build_ext and bdist_wheel for libraries without Python."""
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension.with_options(use_ninja=True)):
        def run(self):
            development = bool(self.inplace or self.editable_mode)
            if development:
                self.pybind11 = pybind11_headers()  # said before anything is built, if missing
            else:
                self.extensions = [e for e in self.extensions if e.name != ROW_KERNELS]
            if not wants_cuda(development):
                self.extensions = [e for e in self.extensions if e.name != CUDA_LIBRARY]
            super().run()

        def get_ext_filename(self, name):
            *folders, last = name.split(".")
            if last.startswith("lib"):
                return os.path.join(*folders, f"{last}.so")
            return super().get_ext_filename(name)

        def build_extension(self, extension):
            output = Path(self.get_ext_fullpath(extension.name))
            if extension.name == CUDA_LIBRARY:
                capabilities = os.environ.get("TORCH_CUDA_ARCH_LIST", CAPABILITIES)
                build_cuda(output, Path(self.build_temp) / "cuda", capabilities)
                return
            if extension.name == ROW_KERNELS:
                extension.include_dirs.append(self.pybind11)
                extension.extra_compile_args = CXX_FLAGS
                extension.library_dirs.append(str(output.parent))
                extension.libraries.append("pcoherence_cpu")
                extension.runtime_library_dirs.append("$ORIGIN")
            super().build_extension(extension)

    class Wheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    return {"build_ext": Build, "bdist_wheel": Wheel}


def extension_modules():
    """What can be built, or nothing when it is switched off; only building needs torch."""
    if os.environ.get("PCOHERENCE_NO_EXTENSION") == "1":
        return [], {}
    library = cpu_library()  # says what is missing, torch itself for one
    cuda = Extension(CUDA_LIBRARY, [], depends=[*CUDA_SOURCES, *headers()])
    return [library, row_kernels(), cuda], commands()


if __name__ == "__main__":  # benchmarks/gpu/pack.py wants the lists alone
    ext_modules, cmdclass = extension_modules()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
