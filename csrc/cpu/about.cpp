// What the library says of itself to whoever loads it, as JSON: pcoherence/library.py reads it.
#include <torch/headeronly/version.h>

#include <exception>
#include <limits>
#include <sstream>
#include <string>

#include "../distances.h"
#include "../inline.h"
#include "../objectives.h"
#include "../options.h"
#include "../soft_ranks.h"
#include "pipeline.h"
#include "rows.h"
#include "workspace.h"

namespace pcoherence {
namespace {

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

// Members of an object, or elements of an array, as they are added.
class List {
 public:
  explicit List(char open) : closing_(open == '{' ? '}' : ']') {
    text_ << open;
    text_.precision(std::numeric_limits<double>::max_digits10);
  }
  template <class Value>
  void add(const Value& value) {
    text_ << separator_ << value;
    separator_ = ", ";
  }
  template <class Value>
  void add(std::string_view key, const Value& value) {
    text_ << separator_ << quoted(key) << ": " << value;
    separator_ = ", ";
  }
  std::string text() const { return text_.str() + closing_; }

 private:
  char closing_;
  std::ostringstream text_;
  const char* separator_ = "";
};

std::string build() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  std::string sets;
  for (const Kernels* k : supported_kernels()) sets += std::string(sets.empty() ? "" : ", ") + k->isa;
  List found('{');
  found.add("compiler", quoted(compiler));
  found.add("built with torch", quoted(TORCH_VERSION));
  found.add("instruction sets", quoted(sets));
  found.add("instruction set in use", quoted(kernels().isa));
  return found.text();
}

// Of each option the names that kernels know; of a number none.
std::string options() {
  List found('{');
  Options unsaid;
  for_each_option(unsaid, [&](std::string_view option, const auto& names, auto&) {
    List known('[');
    if constexpr (!std::is_same_v<std::decay_t<decltype(names)>, Number>)
      for (const auto& name : names) known.add(quoted(name));
    found.add(option, known.text());
  });
  return found.text();
}

// What Python states too, or tests go by.
std::string constants() {
  List found('{');
  found.add("huber delta", kHuberDelta);
  found.add("resolution float32", double(kResolution<float>));
  found.add("resolution float64", kResolution<double>);
  found.add("spearman floor", kSpearmanFloor);
  found.add("nearness float32", double(Nearness<float>::distance));
  found.add("nearness float64", Nearness<double>::distance);
  found.add("gradient nearness float32", double(Nearness<float>::gradient));
  found.add("gradient nearness float64", Nearness<double>::gradient);
  found.add("series degree float32", kSeriesDegree<float>);
  found.add("series degree float64", kSeriesDegree<double>);
  found.add("anchors of a block", kMaxBlock);
  found.add("pool bytes", kPoolBytes);
  found.add("neighbourhood", Options{}.neighbourhood);
  return found.text();
}

// An exception must not reach who called from Python.
std::string described() {
  List found('{');
  try {
    found.add("build", build());  // an unknown PCOHERENCE_ISA is found here
    found.add("options", options());
    found.add("constants", constants());
  } catch (const std::exception& error) {
    List failed('{');
    failed.add("error", quoted(error.what()));
    return failed.text();
  }
  return found.text();
}

}  // namespace
}  // namespace pcoherence

extern "C" PCOH_EXPORT const char* pcoherence_about() {
  static const std::string text = pcoherence::described();
  return text.c_str();
}

// For tests: scratch memory is NaN before it is used, or as it comes.
extern "C" PCOH_EXPORT void pcoherence_poison(int on) { pcoherence::poison_workspace = on != 0; }
