// How an operator's function is registered: PCOH_BOX(&function) in place of TORCH_BOX(&function).
// torch's own conversion to std::string (that of 2.13) leaks the string that it makes: 48 bytes for every argument of
// every call, each of which also keeps the heap from joining what is freed around it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>
#include <utility>

namespace pcoherence {

// A string argument as it comes: a handle that is ours to delete, once.
struct StringArgument {
  StringHandle handle;

  std::string take() const {
    std::size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string result(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};

template <class T>
using Argument = std::conditional_t<std::is_same_v<T, std::string>, StringArgument, T>;

template <class T>
T unwrapped(Argument<T>& argument) {
  if constexpr (std::is_same_v<T, std::string>)
    return argument.take();
  else
    return std::move(argument);
}

template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static Result call(Argument<Parameters>... arguments) { return function(unwrapped<Parameters>(arguments)...); }
};

}  // namespace pcoherence

#define PCOH_BOX(function) TORCH_BOX((&pcoherence::Boxed<(function)>::call))
