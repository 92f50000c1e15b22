// Integer arithmetic that host and device share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NSA_INLINE __host__ __device__ __forceinline__
#else
#define NSA_INLINE inline
#endif

namespace nsa {

NSA_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
NSA_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
NSA_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return minimum(maximum(x, low), high);
}
NSA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides a number below 2^31 by a number that is known when the fill is bound. It takes a
// multiplication and a shift; a GPU needs dozens of instructions for a division.
struct Divisor {
  uint32_t value;
  uint32_t multiplier;  // ceil(2^shift / value)
  uint32_t shift;       // kDividendBits + ceil(log2(value)), which makes every quotient exact
};

constexpr uint32_t kDividendBits = 31;

inline Divisor divisor_of(int64_t value) {
  uint32_t log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  const uint32_t shift = kDividendBits + log2;
  const uint64_t multiplier = ((uint64_t{1} << shift) + value - 1) / value;
  return Divisor{static_cast<uint32_t>(value), static_cast<uint32_t>(multiplier), shift};
}

// Rounded up.
inline uint32_t log2_of(const Divisor& divisor) { return divisor.shift - kDividendBits; }

NSA_INLINE uint32_t divide(uint32_t x, const Divisor& by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * by.multiplier) >> by.shift);
}

// Rounds up, without a branch: a branch would keep the loads after it from overlapping with those
// before it.
NSA_INLINE uint32_t divide_up(uint32_t x, const Divisor& by) {
  const uint32_t is_any = x != 0;
  return divide(x - is_any, by) + is_any;
}

}  // namespace nsa
