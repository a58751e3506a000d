"""Builds the C++ and CUDA extensions; everything else is declared in pyproject.toml.

PCOHERENCE_NO_EXTENSION=1 installs the Python files alone: the reference needs no compiler.
PCOHERENCE_CUDA=1 makes it an error that the CUDA extension cannot be built, 0 leaves it out.
TORCH_CUDA_ARCH_LIST chooses the GPUs that it is compiled for.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

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


CUDA_SOURCES = ["csrc/tables.cpp"] + [
    f"csrc/cuda/{name}" for name in ("launch.cu", "module.cpp", "ops.cpp")
]
CUDA_MACROS = [STABLE_ABI, ("USE_CUDA", None)]

NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads=4"]


def headers():
    """What a change of rebuilds everything."""
    return sorted(str(path) for path in Path("csrc").rglob("*.[hi]*"))


def cpu_sources():
    """Files of pcoherence._C."""
    return ["csrc/tables.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]


def cpu_extension():
    """The CPU kernels, their operators and build information: pcoherence._C."""
    try:
        import pybind11
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"pcoherence: building the extension needs {error.name}; install torch>=2.11 and "
            "'pybind11>=3' first (and use --no-build-isolation), or set PCOHERENCE_NO_EXTENSION=1"
        ) from error
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "pcoherence._C",
        cpu_sources(),
        include_dirs=[pybind11.get_include()],
        define_macros=[STABLE_ABI],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=headers(),
    )


def cuda_extension():
    """The CUDA kernels and their operators, pcoherence._C_cuda; None where they are not built.

    Where torch has CUDA they are wanted: that they cannot be built is said, or is an error.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    wanted = os.environ.get("PCOHERENCE_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"pcoherence: PCOHERENCE_CUDA: expected 0 or 1; got {wanted!r}")
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif CUDA_HOME is None:
        missing = "there is no nvcc on PATH, and CUDA_HOME is not set"
    if wanted == "0" or (wanted is None and torch.version.cuda is None):
        return None
    if missing:
        message = f"pcoherence: the CUDA extension cannot be built: {missing}"
        if wanted == "1":
            raise SystemExit(message)
        print(f"{message}; backend 'cuda' will not be there", file=sys.stderr)
        return None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    return CUDAExtension(
        "pcoherence._C_cuda",
        CUDA_SOURCES,
        define_macros=CUDA_MACROS,
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": NVCC_FLAGS,
        },
        depends=headers(),
    )


def extension_modules():
    """What can be built here, or nothing when it is switched off; only building needs torch."""
    if os.environ.get("PCOHERENCE_NO_EXTENSION") == "1":
        return [], {}
    extension = cpu_extension()  # says what is missing, torch itself for one
    from torch.utils.cpp_extension import BuildExtension

    built = [found for found in (extension, cuda_extension()) if found]
    return built, {"build_ext": BuildExtension.with_options(use_ninja=True)}


if __name__ == "__main__":  # benchmarks/gpu/pack.py wants the lists alone
    ext_modules, cmdclass = extension_modules()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
