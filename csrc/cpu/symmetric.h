// Square matrices of distances or gradients, a strip of rows at a time.
#pragma once

#include "simd.h"

namespace pcoherence::PCOH_ISA {
namespace {

// The tiles (i, j), i <= j, of one strip of rows of a square matrix.
template <class T, class Visit>
void for_each_upper_tile(std::int64_t size, std::int64_t strip, Visit&& visit) {
  constexpr std::int64_t lanes = lanes_v<T>;
  const std::int64_t begin = strip * kSymmetricStrip, end = std::min(begin + kSymmetricStrip, size);
  for (std::int64_t j = begin; j < size; j += lanes)
    for (std::int64_t i = begin; i < std::min(end, j + lanes); i += lanes) visit(i, j);
}

template <class T>
void mirror(T* matrix, std::int64_t size, std::int64_t ld, std::int64_t strip, bool beyond_cache) {
  constexpr int lanes = lanes_v<T>;
  const auto copy = [&](auto&& put) {
    for_each_upper_tile<T>(size, strip, [&](std::int64_t i, std::int64_t j) {
      if (i == j) return;
      vec_t<T> tile[lanes];
      for (int r = 0; r < lanes; ++r) tile[r] = load(matrix + (i + r) * ld + j);
      transpose(tile);
      for (int r = 0; r < lanes; ++r) put(matrix + (j + r) * ld + i, tile[r]);
    });
  };
  if (beyond_cache) {
    copy([](T* p, vec_t<T> v) { stream(p, v); });
    stream_fence();
  } else {
    copy([](T* p, vec_t<T> v) { store(p, v); });
  }
}

template <class T>
void plus_transpose(const T* matrix, std::int64_t size, std::int64_t ld, std::int64_t begin, std::int64_t end, T* out) {
  constexpr int lanes = lanes_v<T>;
  // All rows of a few columns of the mirror image: each of its lines is used once.
  for (std::int64_t j = 0; j < size; j += lanes)
    for (std::int64_t i = begin; i < end; i += lanes) {
      vec_t<T> mirrored[lanes];
      for (int r = 0; r < lanes; ++r) mirrored[r] = load(matrix + (j + r) * ld + i);
      transpose(mirrored);
      for (int r = 0; r < lanes; ++r)
        store(out + (i - begin + r) * ld + j, load(matrix + (i + r) * ld + j) + mirrored[r]);
    }
}

template <class T>
double sum_row(const T* row, std::int64_t n) {
  Sum sum;
  double rest = 0;
  std::int64_t k = 0;
  for (; k + lanes_v<T> <= n; k += lanes_v<T>) sum.add(load(row + k));
  for (; k < n; ++k) rest += double(row[k]);
  return sum.total() + rest;
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
