// What a grid of few bins does in registers.
#pragma once

#include "core.h"

namespace pcoherence::PCOH_ISA {

// Where bins are few, registers hold them: an element finds its coefficients by a permutation instead of gathering
// them, and where they are very few it adds its powers to every bin, masked, instead of scattering them.
template <class T>
struct FewBins {
  static constexpr int most = 0, most_masked = 0;
};
#if defined(PCOH_AVX512)
template <>
struct FewBins<float> {
  static constexpr int order = GridOrder<float>::order;
  static constexpr int per_register = lanes_v<float>;
  static constexpr int most = 2 * per_register;  // two registers for each coefficient
  static constexpr int most_masked = 6;          // with more, masks take as long as scattering (measured)

  // moments [bins, order]; bin, x, v: [n]
  static void spread(const std::int32_t* bin, const float* x, const float* v, int n, int bins, float* moments) {
    // The sums of three take 24 of 32 registers; four are two and two, since a pass for one alone costs as much.
    for (int b = 0; b < bins;) {
      const int left = bins - b, together = left % 3 == 0 || left > 4 ? 3 : left >= 2 ? 2 : 1;
      float* to = moments + b * order;
      if (together == 3)
        spread_to<3>(bin, x, v, n, b, to);
      else if (together == 2)
        spread_to<2>(bin, x, v, n, b, to);
      else
        spread_to<1>(bin, x, v, n, b, to);
      b += together;
    }
  }

  // What evaluates the polynomials of one field [bins, order]; a register holds 16 of the bins.
  template <int registers>
  class Field {
   public:
    Field(const float* field, int bins) {
      alignas(64) float columns[order][per_register * registers] = {};
      for (int b = 0; b < bins; ++b)
        for (int q = 0; q < order; ++q) columns[q][b] = field[b * order + q];
      for (int q = 0; q < order; ++q)
        for (int i = 0; i < registers; ++i) column_[q][i] = load(columns[q] + per_register * i);
    }
    vec_t<float> at(index_t<float> bin, vec_t<float> x) const {
      vec_t<float> value = of(order - 1, bin);
      for (int q = order - 2; q >= 0; --q) value = value * x + of(q, bin);
      return value;
    }

   private:
    vec_t<float> of(int q, index_t<float> bin) const {
      const auto which = reinterpret_cast<__m512i>(bin);
      if constexpr (registers == 1)
        return _mm512_permutexvar_ps(which, column_[q][0]);
      else
        return _mm512_permutex2var_ps(column_[q][0], which, column_[q][1]);
    }
    vec_t<float> column_[order][registers];
  };

 private:
  template <int together>
  static void spread_to(const std::int32_t* bin, const float* x, const float* v, int n, int first, float* moments) {
    __m512 sum[together][order];
    for (auto& terms : sum)
      for (auto& term : terms) term = _mm512_setzero_ps();
    for (int k = 0; k < n; k += 16) {
      const __m512i own = _mm512_loadu_si512(bin + k);
      const __m512 at = _mm512_loadu_ps(x + k);
      __m512 power = _mm512_loadu_ps(v + k);
      __mmask16 here[together];
      for (int i = 0; i < together; ++i) here[i] = _mm512_cmpeq_epi32_mask(own, _mm512_set1_epi32(first + i));
      for (int q = 0; q < order; ++q) {
        for (int i = 0; i < together; ++i) sum[i][q] = _mm512_mask_add_ps(sum[i][q], here[i], sum[i][q], power);
        power = _mm512_mul_ps(power, at);
      }
    }
    for (int i = 0; i < together; ++i)
      for (int q = 0; q < order; ++q) moments[i * order + q] = _mm512_reduce_add_ps(sum[i][q]);
  }
};
#endif

}  // namespace pcoherence::PCOH_ISA
