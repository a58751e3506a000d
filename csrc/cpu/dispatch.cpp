// Chooses the row kernels for this processor, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace pcoherence {

namespace isa_default {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace isa_v3 {
extern const Kernels table;
}
namespace isa_v4 {
extern const Kernels table;
}
#endif

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&isa_v4::table);
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&isa_v3::table);
#endif
  found.push_back(&isa_default::table);
  return found;
}

namespace {

const Kernels& select() {
  const auto found = supported_kernels();
  const char* wanted = std::getenv("PCOHERENCE_ISA");
  if (wanted == nullptr) return *found.front();
  std::string known;
  for (const Kernels* k : found) {
    if (std::string(k->isa) == wanted) return *k;
    known += std::string(known.empty() ? "" : ", ") + k->isa;
  }
  throw std::runtime_error("PCOHERENCE_ISA: expected one of " + known + " (what this processor supports), got '" +
                           wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = select();
  return chosen;
}

}  // namespace pcoherence
