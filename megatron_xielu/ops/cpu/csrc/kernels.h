// What the translation units of this folder share: an activation's shape and coefficients, and the
// table of functions that each instruction set fills.
#pragma once

#include <cstdint>

namespace megatron_xielu {

// Every activation of the family is zero at zero and a polynomial above, with the slope beta at zero:
//   x > 0:   beta x + p2 x^2 + p3 x^3
//   x <= 0:  0  |  beta x + n x^2  |  beta x + n (e^x - 1 - x)
enum class Negative : int32_t { zero, quadratic, exponential };

struct Shape {
  bool cubic;
  Negative negative;
};

// Effective coefficients, after softplus.
struct Coefficients {
  double beta = 0, p2 = 0, p3 = 0, n = 0;
  double n_minus_beta = 0;  // on its own, because n - beta loses bits where n is close to beta
};

// Sums over elements of dy times the derivatives of y by the coefficients.
struct Sums {
  double p2 = 0, p3 = 0, n = 0;
};

enum class Storage : int32_t { float32, bfloat16, float16 };

// A 16-bit input has 65,536 values: above a size it pays to compute each of them once, in float64.
constexpr int64_t PATTERNS = 1 << 16;

struct Derivatives {
  float slope;  // dy/dx
  float n;      // dy/dn
};

struct Task {
  Storage storage;
  Shape shape;
  Coefficients coefficients;
  const uint16_t* y_table = nullptr;           // PATTERNS + 1: a gather reads one entry further
  const Derivatives* derivatives = nullptr;    // PATTERNS
  bool stream = false;                         // stores bypass the caches
};

// A function works on `count` consecutive elements. `bias` is null or has `count` elements.
struct Kernels {
  void (*forward)(const Task&, const void* x, const void* bias, void* y, int64_t count);
  void (*backward)(const Task&, const void* grad_y, const void* x, const void* bias, void* grad_x,
                   int64_t count, Sums* sums);
  // Entries [begin, end) of a table, both multiples of 32, on one side of PATTERNS / 2.
  void (*fill_y_table)(const Task&, uint16_t* table, int64_t begin, int64_t end);
  void (*fill_derivatives_table)(const Task&, Derivatives* table, int64_t begin, int64_t end);
  // What memory alone costs: y = x, and y = x xor z, of `bytes`, a multiple of 64.
  void (*copy)(const void* x, void* y, int64_t bytes, bool stream);
  void (*read_two_write_one)(const void* x, const void* z, void* y, int64_t bytes, bool stream);
};

extern const Kernels baseline_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace megatron_xielu
