// What a row kernel sees of the machine: a group of threads, its barriers, shuffles and memory. The kernels are
// templates over Group, so that one source is compiled by nvcc (CudaGroup: one thread block) and, for tests, by a host
// compiler (EmulatedGroup in tests/emulate.h).
//
// A Group has  thread() threads() lane() warp() warps()   warps of 32, threads() a multiple of that
//              sync() sync_warp()                         barriers; memory written before is seen after
//              shuffle(v, lane) shuffle_xor(v, mask)      any trivially copyable v whose size is a multiple of 4 bytes
//              ballot(condition)                          bit l is set where lane l's condition holds
//              match(v)                                   int: bit l is set where lane l's v is this lane's
//              add(p, v)                                  atomic; returns what was there. Integers only: any order of
//                                                         additions gives the same sum, so results do not depend on it
//              lower(p, v)                                atomic minimum, likewise
//              set(p, bits)                               atomic or, likewise
//              peek(p)                                    what is there while others may be setting bits
//              swap_if(p, expected, v)                    atomic compare and swap; returns what was there
//              in_fast(p), fast(p)                        whether p lies in fast memory; p, known to lie there: the
//                                                         compiler then uses shorter addresses and instructions
//              scratch()                                  kScratchBytes, fast, until the next call that may use them
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../row.h"

namespace pcoherence::cuda {

inline constexpr int kWarp = 32;
// The largest user: 32 partial sums of 4 bytes (or 16 of 8) for each of at most 32 warps, see spread_in_registers().
inline constexpr int kScratchBytes = 32 * 32 * 4;

// What a thread adds up of its own, in float64.
struct Sum {
  double value = 0;
  template <class T>
  PCOH_DEVICE void add(T v) {
    value += double(v);
  }
  template <class T>
  PCOH_DEVICE void add_product(T v, T w) {
    value += double(v) * double(w);
  }
};

// For code that vectors run, too (../row.h): here an element is treated at a time.
struct OneElement {
  using Sum = cuda::Sum;
  static constexpr bool sums_gradient = false;  // a kernel of its own does, where features want it

  template <class T>
  static PCOH_DEVICE T all(T x) {
    return x;
  }
  template <class T>
  static PCOH_DEVICE T get(const T* p, int k) {
    return p[k];
  }
  template <class T>
  static PCOH_DEVICE void put(T* p, int k, T v) {
    p[k] = v;
  }
};

#if defined(__CUDACC__)
class CudaGroup : public OneElement {
 public:
  __device__ explicit CudaGroup(char* scratch) : scratch_(scratch) {}

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return thread() % kWarp; }
  __device__ int warp() const { return thread() / kWarp; }
  __device__ int warps() const { return threads() / kWarp; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ char* scratch() const { return fast(scratch_); }
  static __device__ bool in_fast(const void* p) { return __isShared(p); }
  template <class V>
  static __device__ V* fast(V* p) {
    asm("" : "+l"(p));  // or the compiler makes one piece of code again of those for fast and for any memory
    __builtin_assume(__isShared(p));
    return p;
  }
  __device__ unsigned ballot(bool condition) const { return __ballot_sync(kAll, condition); }
  __device__ unsigned match(int v) const { return __match_any_sync(kAll, v); }
  template <class V>
  __device__ V add(V* p, V v) const {
    return atomicAdd(p, v);
  }
  __device__ void lower(int* p, int v) const { atomicMin(p, v); }
  __device__ void set(unsigned* p, unsigned bits) const { atomicOr(p, bits); }
  static __device__ unsigned peek(const unsigned* p) { return *static_cast<const volatile unsigned*>(p); }
  __device__ int swap_if(int* p, int expected, int v) const { return atomicCAS(p, expected, v); }

  template <class V>
  __device__ V shuffle(V v, int lane) const {
    return by_word(v, [=](unsigned word) { return __shfl_sync(kAll, word, lane); });
  }
  template <class V>
  __device__ V shuffle_xor(V v, int mask) const {
    return by_word(v, [=](unsigned word) { return __shfl_xor_sync(kAll, word, mask); });
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;

  template <class V, class F>
  static __device__ V by_word(V v, F f) {
    static_assert(sizeof(V) % 4 == 0, "shuffles move words of 4 bytes");
    unsigned words[sizeof(V) / 4];
    memcpy(words, &v, sizeof v);
    PCOH_UNROLL
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) words[i] = f(words[i]);
    memcpy(&v, words, sizeof v);
    return v;
  }

  char* scratch_;
};
#endif

// ---------------------------------------------------------------- memory

// Memory of one group, handed out front to back: from fast (shared) memory while that lasts, then from slow (global).
// A copy of an arena gives the same memory again: this is how one stage reuses what an earlier one is done with.
class Arena {
 public:
  PCOH_DEVICE Arena(char* fast, std::int64_t fast_bytes, char* slow, std::int64_t slow_bytes)
      : fast_(fast), slow_(slow), fast_left_(fast_bytes), slow_left_(slow_bytes) {}

  // count elements of V; of fast memory only what leaves `reserve` bytes of it.
  template <class V>
  PCOH_DEVICE V* take(std::int64_t count, std::int64_t reserve = 0) {
    const std::int64_t bytes = (count * std::int64_t(sizeof(V)) + 15) / 16 * 16;
    if (bytes + reserve <= fast_left_) return cut<V>(fast_, fast_left_, bytes);
    if (bytes > slow_left_) PCOH_TRAP();  // task_bytes() is wrong
    return cut<V>(slow_, slow_left_, bytes);
  }

  PCOH_DEVICE std::int64_t fast_left() const { return fast_left_; }

 private:
  template <class V>
  static PCOH_DEVICE V* cut(char*& from, std::int64_t& left, std::int64_t bytes) {
    V* result = reinterpret_cast<V*>(from);
    from += bytes;
    left -= bytes;
    return result;
  }

  char *fast_, *slow_;
  std::int64_t fast_left_, slow_left_;
};

// ---------------------------------------------------------------- sums over the group, in an order that is fixed

struct Plus {
  template <class V>
  PCOH_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  PCOH_DEVICE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// combine() of all threads' values, for every thread. combine must be commutative bit by bit, as + is.
template <class V, class G, class F>
PCOH_DEVICE V reduce(G& g, V v, F combine) {
  static_assert(sizeof(V) * 32 <= kScratchBytes, "one value for each warp");
  PCOH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v = combine(v, g.shuffle_xor(v, mask));
  V* of_warp = reinterpret_cast<V*>(g.scratch());
  if (g.lane() == 0) of_warp[g.warp()] = v;
  g.sync();
  v = of_warp[0];
  for (int w = 1; w < g.warps(); ++w) v = combine(v, of_warp[w]);
  g.sync();
  return v;
}

template <class V, class G>
PCOH_DEVICE V total(G& g, V v) {
  return reduce(g, v, Plus{});
}

// Sum of the values of the lanes before this one.
template <class V, class G>
PCOH_DEVICE V exclusive_in_warp(G& g, V v) {
  V sum = v;
  PCOH_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = g.shuffle(sum, g.lane() >= step ? g.lane() - step : 0);
    if (g.lane() >= step) sum = below + sum;
  }
  const V before = g.shuffle(sum, g.lane() > 0 ? g.lane() - 1 : 0);
  return g.lane() > 0 ? before : V(0);
}

// Sum of the values of the threads before this one, and of all.
template <class V>
struct Running {
  V before, all;
};
template <class V, class G>
PCOH_DEVICE Running<V> exclusive(G& g, V v) {
  const V before = exclusive_in_warp(g, v);
  V* of_warp = reinterpret_cast<V*>(g.scratch());
  if (g.lane() == kWarp - 1) of_warp[g.warp()] = before + v;
  g.sync();
  V earlier = 0, all = 0;
  for (int w = 0; w < g.warps(); ++w) {
    if (w == g.warp()) earlier = all;
    all += of_warp[w];
  }
  g.sync();
  return {earlier + before, all};
}

// The part of [0, count) that a thread owns when it must be contiguous. Of odd sizes, so that the threads of a warp
// meet in no bank of shared memory.
struct Chunk {
  int begin, end;
};
template <class G>
PCOH_DEVICE Chunk chunk(const G& g, int count) {
  const int size = (count + g.threads() - 1) / g.threads() | 1;
  const int begin = size * g.thread() < count ? size * g.thread() : count;
  return {begin, begin + size < count ? begin + size : count};
}

// Running sums: store(i, sum of load(j) over j < i) for i = 0, ..., count - 1; returns the sum of all.
template <class G, class Load, class Store>
PCOH_DEVICE auto running_sums(G& g, int count, Load load, Store store) {
  using V = decltype(load(0));
  const Chunk c = chunk(g, count);
  V sum = 0;
  for (int i = c.begin; i < c.end; ++i) sum += load(i);
  const Running<V> running = exclusive(g, sum);
  sum = running.before;
  for (int i = c.begin; i < c.end; ++i) {
    const V own = load(i);
    store(i, sum);
    sum += own;
  }
  return running.all;
}

// f(0), ..., f(count - 1) with constants: an array indexed by them stays in registers. An unrolled loop does not see to
// that, since arrays are taken apart before loops are.
template <int count, class F>
PCOH_DEVICE void unrolled(F f) {
  if constexpr (count > 0) {
    unrolled<count - 1>(f);
    f(std::integral_constant<int, count - 1>{});
  }
}

// sum[0] of lane l becomes the total of sum[l % count] over its part of the warp, `count` neighbours: halving the sums
// that a lane is responsible for takes `count` shuffles, instead of 3 and more for each sum. All totals add up the
// lanes in the same order.
template <int half, class V, class G, int count>
PCOH_DEVICE void halve(G& g, V (&sum)[count]) {
  if constexpr (half > 0) {
    const bool upper = g.lane() & half;
    unrolled<half>([&](auto i) {
      const V keep = upper ? sum[i + half] : sum[i], give = upper ? sum[i] : sum[i + half];
      sum[i] = keep + g.shuffle_xor(give, half);
    });
    halve<half / 2>(g, sum);
  }
}
// The same over `lanes` neighbours.
template <int lanes = kWarp, class V, class G, int count>
PCOH_DEVICE void total_by_lane(G& g, V (&sum)[count]) {
  halve<count / 2>(g, sum);
  PCOH_UNROLL
  for (int mask = count; mask < lanes; mask *= 2) sum[0] += g.shuffle_xor(sum[0], mask);
}

// Elements that one load or store moves.
template <class T, int count>
struct alignas(count * sizeof(T)) Pack {
  T value[count];
};
template <int count, class T>
PCOH_DEVICE Pack<T, count> load(const T* p) {
  return *reinterpret_cast<const Pack<T, count>*>(p);
}

// ---------------------------------------------------------------- one row

// t >= 0, or t * factor, rounded to an integer without the conversion unit, which takes 8 times as long as an addition.
// The float that is added leaves no bits for a fraction. The product is fused by name: wherever it is asked for, it has
// to round alike.
template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  static constexpr float shift = 0x1.8p23f;  // for t up to 2^22
  static constexpr float limit = 0x1p22f;
  PCOH_DEVICE explicit Rounded(float t) : shifted(t + shift) {}
  PCOH_DEVICE Rounded(float t, float factor) : shifted(std::fma(t, factor, shift)) {}
  PCOH_DEVICE float value() const { return shifted - shift; }
  PCOH_DEVICE int index() const {
    int bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4B400000;  // the bits of `shift`
  }
  float shifted;
};
template <>
struct Rounded<double> {
  static constexpr double shift = 0x1.8p52;
  static constexpr double limit = 0x1p31;  // of the index
  PCOH_DEVICE explicit Rounded(double t) : shifted(t + shift) {}
  PCOH_DEVICE Rounded(double t, double factor) : shifted(std::fma(t, factor, shift)) {}
  PCOH_DEVICE double value() const { return shifted - shift; }
  PCOH_DEVICE int index() const {
    std::int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return static_cast<int>(bits);  // the low word
  }
  double shifted;
};

// 1 / x to about a unit in the last place, x neither 0 nor subnormal: the division that rounds takes a branch and ten
// instructions, and what it calls takes registers from whoever divides.
PCOH_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return std::fma(r, std::fma(-x, r, 1.0f), r);
#else
  return 1 / x;
#endif
}
PCOH_DEVICE double reciprocal(double x) { return 1 / x; }

// Bits of a word that are set.
PCOH_DEVICE int ones(unsigned word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Where in a bin of a grid an element lies.
template <class T>
struct Local {
  int bin;
  T x;  // in [-1, 1]
};

// How the bin of an element, and where it lies there, are one number of the row's type, its code.
template <class T>
class Cells;
// The bin's number in as many bits as it takes, the place within it in the others: every bin resolves as much.
template <>
class Cells<float> {
 public:
  Cells() = default;
  PCOH_DEVICE Cells(int bins, const int* places) : places_(places) {
    while (1ll << bits_ < bins || bits_ == 0) ++bits_;
    per_bin_ = std::ldexp(1.0f, 32 - bits_);
  }

  PCOH_DEVICE float code(int bin, unsigned fraction) const {
    return as_float(unsigned(bin) << (32 - bits_) | fraction >> bits_);
  }
  // t: in bins, none of which are left out.
  PCOH_DEVICE float code(float t) const { return as_float(static_cast<unsigned>(t * per_bin_)); }
  PCOH_DEVICE Local<float> local(float code) const {
    unsigned bits;
    memcpy(&bits, &code, sizeof bits);
    const float half = as_float((bits << bits_) >> 9 | 0x3F800000u);  // 1 to 2: 23 bits of the fraction
    return {static_cast<int>(bits >> (32 - bits_)), half * 2 - 3};
  }
  PCOH_DEVICE bool coded() const { return bits_ > 0; }
  PCOH_DEVICE const int* places() const { return places_; }

 private:
  static PCOH_DEVICE float as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
  int bits_ = 0;
  float per_bin_ = 0;
  const int* places_ = nullptr;
};
// Their sum. Where bins are left out, a point never lies so near to its bin's end that the sum rounds to another, of
// 2^16 and less; where none are, the next one's polynomial holds as well, and the least of distances keep their digits.
template <>
class Cells<double> {
 public:
  Cells() = default;
  PCOH_DEVICE Cells(int, const int* places) : coded_(true), places_(places), edge_(places != nullptr ? 0x1p-36 : 0) {}

  PCOH_DEVICE double code(int bin, double fraction) const {
    return bin + std::fmin(std::fmax(fraction, edge_), 1 - edge_);
  }
  PCOH_DEVICE Local<double> local(double code) const {
    const Rounded<double> bin(code - 0.5);
    return {bin.index(), (code - bin.value()) * 2 - 1};
  }
  PCOH_DEVICE bool coded() const { return coded_; }
  PCOH_DEVICE const int* places() const { return places_; }

 private:
  bool coded_ = false;
  const int* places_ = nullptr;
  double edge_ = 0;
};

// Candidates of one anchor.
template <class T>
struct Row {
  const T* weights;  // [n] or null: ones
  int n;
  int self;             // candidate excluded, or -1
  T* values = nullptr;  // [n] as given, then for the kernel sums: positions, in units of the sums; of a grid: codes
  double sums_unit = 1;
  Cells<T> cells = {};  // of a grid

  PCOH_DEVICE T weight(int k) const { return k == self ? T(0) : weights ? weights[k] : T(1); }
  // Position in units of the sums.
  PCOH_DEVICE T place(int k) const {
    if (!cells.coded()) return values[k];
    const Local<T> here = cells.local(values[k]);
    return T(cells.places() != nullptr ? cells.places()[here.bin] : here.bin) + (here.x + 1) / 2;
  }
  PCOH_DEVICE double unit() const { return sums_unit; }
};

// f(k) for every k of a thread: neighbours go to neighbours, whose accesses to memory are one.
template <class G, class F>
PCOH_DEVICE void each(const G& g, int n, F f) {
  const int step = g.threads();
  for (int k = g.thread(); k < n; k += step) f(k);
}

// f(k, load(k)) for every k of a thread, the same k as each(): several loads wait at the same time.
template <class G, class Load, class F>
PCOH_DEVICE void each_loaded(const G& g, int n, Load load, F f) {
  constexpr int together = 4;  // of a row that no fast memory holds, 24 warps then ask for 12 KiB at a time
  const int step = g.threads();
  for (int k = g.thread(); k < n; k += together * step) {
    decltype(load(k)) value[together];
    unrolled<together>([&](auto i) { value[i] = load(k + i * step < n ? k + i * step : k); });
    unrolled<together>([&](auto i) {
      if (k + i * step < n) f(k + i * step, value[i]);
    });
  }
}

// f(weight), weight(k) as above: one loop for rows without weights and one for the others, instead of a branch an
// element.
template <class T, class F>
PCOH_DEVICE void with_weights(const Row<T>& row, F f) {
  const T* weights = row.weights;
  const int self = row.self;
  if (weights == nullptr)
    f([=](int k) { return k == self ? T(0) : T(1); });
  else
    f([=](int k) { return k == self ? T(0) : weights[k]; });
}

// p, known to be fast if it is.
template <bool fast, class G, class V>
PCOH_DEVICE V* at(const G& g, V* p) {
  if constexpr (fast)
    return g.fast(p);
  else
    return p;
}

// f(p), known to be fast where it is.
template <class G, class V, class F>
PCOH_DEVICE void by_memory(G& g, V* p, F f) {
  if (g.in_fast(p))
    f(g.fast(p));
  else
    f(p);
}

template <class G, class T, class F>
PCOH_DEVICE void each_candidate(const G& g, const Row<T>& row, F f) {
  with_weights(row, [&](auto weight) { each(g, row.n, [&](int k) { f(k, weight(k)); }); });
}

template <class G, class T, class F>
PCOH_DEVICE void each_value(G& g, const Row<T>& row, const T* from, F f) {
  by_memory(g, row.values, [&](T* copy) {
    each_candidate(g, row, [&](int k, T w) {
      const T v = from[k];
      copy[k] = v;
      f(k, v, w);
    });
  });
}

template <class G, class F>
PCOH_DEVICE void each_element(const G& g, int n, F f) {
  each(g, n, f);
}
template <class G, class Index, class F>
PCOH_DEVICE void each_indexed(const G& g, int n, Index index, F f) {
  each_loaded(g, n, index, f);
}
template <class G, class F>
PCOH_DEVICE double sum_each(G& g, int n, F f) {
  double sum = 0;
  each(g, n, [&](int k) { sum += f(k); });
  return total(g, sum);
}

template <class G>
PCOH_DEVICE double total(G& g, const Sum& sum) {
  return total(g, sum.value);
}
struct PlusThree {
  PCOH_DEVICE Triple operator()(const Triple& x, const Triple& y) const { return {x.a + y.a, x.b + y.b, x.c + y.c}; }
};
template <class G>
PCOH_DEVICE Triple total(G& g, const Sum& a, const Sum& b, const Sum& c) {
  return reduce(g, Triple{a.value, b.value, c.value}, PlusThree{});
}

struct MergeExtremes {
  template <class T>
  PCOH_DEVICE Extremes<T> operator()(const Extremes<T>& a, const Extremes<T>& b) const {
    return {a.sum + b.sum, b.low < a.low ? b.low : a.low, b.high > a.high ? b.high : a.high};
  }
};
template <class G, class T>
PCOH_DEVICE Extremes<T> extremes(G& g, T low, T high, const Sum& sum) {
  return reduce(g, Extremes<T>{sum.value, low, high}, MergeExtremes{});
}

// Weights of a row as one thread, or all, have seen them.
template <class T>
struct SeenWeights {
  double sum;
  T least, most;  // of those > 0
  int count;
};
struct MergeWeights {
  template <class T>
  PCOH_DEVICE SeenWeights<T> operator()(const SeenWeights<T>& a, const SeenWeights<T>& b) const {
    return {a.sum + b.sum, b.least < a.least ? b.least : a.least, b.most > a.most ? b.most : a.most, a.count + b.count};
  }
};
template <class G, class T>
PCOH_APART Weighed weigh(G& g, const Row<T>& row) {
  if (row.weights == nullptr) {
    const int count = row.n - (row.self >= 0 && row.self < row.n);
    return {double(count), count, true};
  }
  constexpr T inf = std::numeric_limits<T>::infinity();
  SeenWeights<T> seen{0, inf, -inf, 0};
  each_candidate(g, row, [&](int, T w) {
    seen.sum += double(w);
    if (!(w > 0)) return;
    seen.least = w < seen.least ? w : seen.least;
    seen.most = w > seen.most ? w : seen.most;
    ++seen.count;
  });
  seen = reduce(g, seen, MergeWeights{});
  return {seen.sum, seen.count, seen.least == seen.most};
}

}  // namespace pcoherence::cuda
