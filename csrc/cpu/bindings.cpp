// The Python module pcoherence._C: the row kernels, for tests. Only where the library is developed; it needs nothing of
// torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "../options.h"
#include "rows.h"
#include "workspace.h"

namespace py = pybind11;

namespace pcoherence {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const Kernels& kernels_for(const std::string& isa) {
  for (const Kernels* k : supported_kernels())
    if (isa == k->isa) return *k;
  throw py::value_error("isa: this processor has no '" + isa + "'");
}

// A row as the kernels want it: padded, aligned, the padding of weight 0.
template <class T>
struct PaddedRow {
  PaddedRow(const Array<T>& given, T padding) : size(given.size()) {
    data = buffer.need<T>(padded(size));
    std::copy(given.data(), given.data() + size, data);
    std::fill(data + size, data + padded(size), padding);
  }
  Buffer buffer;
  std::int64_t size;
  T* data;
};

template <class T>
std::pair<Array<T>, double> hard_ranks(const Array<T>& values, const Array<T>& weights, const std::string& isa) {
  const PaddedRow<T> v(values, 0), w(weights, 0);
  if (v.size != w.size || v.size == 0) throw py::value_error("weights: expected as many as values, at least one");
  Workspace ws;
  Buffer buffer;
  T* out = buffer.need<T>(padded(v.size));
  const auto& rows = kernels_for(isa).of<T>();
  const double ties = rows.hard_ranks(v.data, {w.size, w.data, rows.weigh(w.data, w.size)}, out, ws);
  return {Array<T>(v.size, out), ties};
}

// Ranks, or with `upstream` their pullback: see SoftRankRow.
template <class T>
Array<T> soft_rank(const Array<T>& values, const Array<T>& weights, const std::optional<Array<T>>& upstream,
                   double temperature, const std::string& method, const std::string& isa) {
  if (weights.size() != values.size() || (upstream && upstream->size() != values.size()))
    throw py::value_error("weights, upstream: expected as many as values");
  Array<T> out(values.size());
  Workspace ws;
  const Status status = kernels_for(isa).of<T>().soft_rank(
      {values.data(), weights.data(), upstream ? upstream->data() : nullptr, out.mutable_data(), values.size(),
       temperature, named<Method>(kMethodNames, method, "method")},
      ws);
  if (status != Status::ok) throw py::value_error("method: too many bins for this range and temperature");
  return out;
}

template <class T>
void bind_rows(py::module_& m, const std::string& suffix) {
  m.def(("hard_ranks_" + suffix).c_str(), &hard_ranks<T>, py::arg("values"), py::arg("weights"), py::arg("isa"),
        "Mid-ranks F in (0, 1) of one row, and sum_jk w_j w_k [v_j = v_k].");
  m.def(("soft_rank_" + suffix).c_str(), &soft_rank<T>, py::arg("values"), py::arg("weights"), py::arg("upstream"),
        py::arg("temperature"), py::arg("method"), py::arg("isa"),
        "Soft ranks of one row, or with `upstream` their vector-Jacobian product.");
}

}  // namespace
}  // namespace pcoherence

PYBIND11_MODULE(_C, m) {
  using namespace pcoherence;
  m.doc() = "Row kernels of pcoherence, for tests";
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
        return names;
      },
      "Instruction sets this processor supports, best first.");
  bind_rows<float>(m, "float32");
  bind_rows<double>(m, "float64");
}
