// Makes the operators of ops.cpp importable as pcoherence._C_cuda: loading the module registers them.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of pcoherence", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
