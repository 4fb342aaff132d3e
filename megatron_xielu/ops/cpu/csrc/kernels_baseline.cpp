#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define XIELU_LANES 4
#define XIELU_KERNELS baseline_kernels
#include "simd.inl"
