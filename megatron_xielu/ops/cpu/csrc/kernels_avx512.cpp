#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// after the headers, whose functions other files share
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define XIELU_LANES 16
#define XIELU_KERNELS avx512_kernels
#include "simd.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
