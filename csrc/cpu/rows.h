// The interface between the pipeline and the kernels of rows, which are compiled once per instruction set and chosen at
// run time. Nothing here knows about torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../anchor_row.h"
#include "../options.h"
#include "workspace.h"

namespace pcoherence {

// Rows are padded to this many elements (64 bytes of float32), the padding having weight 0.
inline constexpr std::int64_t kRowPadding = 16;
inline std::int64_t padded(std::int64_t n) { return (n + kRowPadding - 1) / kRowPadding * kRowPadding; }

// Rows of a square matrix that RowKernels::mirror takes together: the pages of as many mirrored columns are then used
// once for each vector of a strip, 4 or 8 times.
inline constexpr std::int64_t kSymmetricStrip = 64;

template <class T>
struct CandidateWeights {
  std::int64_t n;    // candidates, before padding
  const T* weights;  // [padded(n)], the padding 0
  Weighed weighed;
};

// A point as it was given: x / length is what its distances are about (length 1, or |x| for cosine).
template <class T>
struct Point {
  const T* x;  // [width]
  double length;
};

// Squared or plain distances of one anchor from the products of features, in place or not.
template <class T>
struct DistanceRow {
  T* products;  // [padded(n)] a . c_j
  T* row;       // [padded(n)] out: distances
  std::int64_t n;
  double anchor_norm;             // |a|^2
  const double* candidate_norms;  // [padded(n)] |c_j|^2
  std::int64_t identical;         // candidate that is this very anchor, or -1
  bool root;                      // distances; otherwise their squares times `factor`
  T factor;
  // For pairs that are too near for products: the points as given, and what takes them to a and c's units.
  Point<T> anchor;
  const T* candidates;              // [n, width]
  const double* candidate_lengths;  // [n], or null: 1
  double scale;                     // a power of two
  std::int64_t width;

  Point<T> candidate(std::int64_t k) const {
    return {candidates + k * width, candidate_lengths ? candidate_lengths[k] : 1.0};
  }
};

// A point and others that it pulls at.
template <class T>
struct PullRow {
  Point<T> own;
  const T* others;            // [.., width], of which these count, with their pulls:
  const double* lengths;      // [..], or null: 1
  const std::int32_t* index;  // [count]
  const T* pull;              // [count]
  std::int64_t count, width;
  double scale;  // a power of two

  double length(std::int64_t k) const { return lengths == nullptr ? 1.0 : lengths[index[k]]; }
};

template <class T>
struct SoftRankRow {
  const T* values;    // [n]
  const T* weights;   // [n] or null
  const T* upstream;  // [n], then `out` is its pullback; null: `out` is the ranks
  T* out;             // [n]
  std::int64_t n;
  double temperature;
  Method method;
};

// The stages, by element type.
template <class T>
struct RowKernels {
  // Preparing features, one row of `width` at a time.
  void (*add_to)(double* sum, const T* x, std::int64_t width);
  double (*squared_distance_to)(const T* x, const double* centre, std::int64_t width);
  // out = (x / length - centre) * scale; returns |out|^2. In place or not.
  double (*shift)(T* out, const T* x, double length, const double* centre, double scale, std::int64_t width);
  std::uint64_t (*hash)(const T* x, std::int64_t width);
  // out[k] = sum_f x_f others_kf
  void (*dot_products)(T* out, const T* x, const T* others, std::int64_t n, std::int64_t width);
  // Appends to `near`, if given, the candidates whose gradient products would cancel (see Nearness in distances.h).
  void (*finish_distances)(const DistanceRow<T>&, std::vector<std::int32_t>* near);
  // row[k] = sum_f |anchor_f - candidates_kf|, padding 0
  void (*cityblock_distances)(T* row, const T* anchor, const T* candidates, std::int64_t n, std::int64_t width);
  // out_f += sum_k v[k * stride] sign(x_f - others_kf): the gradient of cityblock distances
  void (*accumulate_signs)(T* out, const T* x, const T* others, const T* v, std::int64_t stride, std::int64_t count,
                           std::int64_t width);
  // out_f += scale sum_k pull_k (own_f - others_kf), of points over their lengths
  void (*add_differences)(T* out, const PullRow<T>&);
  // Of a square matrix, 64-byte aligned, size and ld (how far rows lie apart) multiples of kRowPadding: one strip of
  // rows from the diagonal on, copied to its mirror image; beyond_cache: the matrix is too large to stay in the cache.
  void (*mirror)(T* matrix, std::int64_t size, std::int64_t ld, std::int64_t strip, bool beyond_cache);
  // Rows begin to end, multiples of kRowPadding, of A + A^T into out [end - begin, ld].
  void (*plus_transpose)(const T* matrix, std::int64_t size, std::int64_t ld, std::int64_t begin, std::int64_t end,
                         T* out);
  double (*sum_row)(const T* row, std::int64_t n);
  Weighed (*weigh)(const T* weights, std::int64_t n);  // [padded(n)], the padding 0
  // An anchor's arrays: [padded(n)]. self: the candidate that is excluded, or -1.
  Outcome (*anchor)(const Options&, const CandidateWeights<T>&, const AnchorRow<T>&, std::int64_t self, Workspace&);
  Status (*soft_rank)(const SoftRankRow<T>&, Workspace&);
  // For tests: F_j into out [padded(n)]; returns sum_jk w_j w_k [v_j = v_k]. values [padded(n)], finite, some weight >
  // 0.
  double (*hard_ranks)(const T* values, const CandidateWeights<T>&, T* out, Workspace&);
};

struct Kernels {
  const char* isa;
  RowKernels<float> f32;
  RowKernels<double> f64;
  template <class T>
  const RowKernels<T>& of() const {
    if constexpr (sizeof(T) == 4)
      return f32;
    else
      return f64;
  }
};

// The best instruction set that this processor has, or the one named by PCOHERENCE_ISA ("default", "v3", "v4").
PCOH_EXPORT const Kernels& kernels();

// The instruction sets that this processor supports, best first.
PCOH_EXPORT std::vector<const Kernels*> supported_kernels();

}  // namespace pcoherence
