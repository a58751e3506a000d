"""Builds the C++ and CUDA extensions; everything else is declared in pyproject.toml.

PCOHERENCE_NO_EXTENSION=1 installs the Python files alone: the reference needs no compiler.
TORCH_CUDA_ARCH_LIST chooses the GPUs that the CUDA extension is compiled for.
"""

import os
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


def headers():
    """What a change of rebuilds everything."""
    return sorted(str(path) for path in Path("csrc").rglob("*.[hi]*"))


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
        ["csrc/tables.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        include_dirs=[pybind11.get_include()],
        define_macros=[STABLE_ABI],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=headers(),
    )


def cuda_extension():
    """The CUDA kernels and their operators, pcoherence._C_cuda; None where they cannot be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None or CUDA_HOME is None:
        return None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    names = ("launch.cu", "module.cpp", "ops.cpp")
    return CUDAExtension(
        "pcoherence._C_cuda",
        ["csrc/tables.cpp", *(f"csrc/cuda/{name}" for name in names)],
        define_macros=[STABLE_ABI, ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads=4"],
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


ext_modules, cmdclass = extension_modules()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
