// What GPUs older than sm_89 make FP8 of, which the emulator, a compiler for sm_90, does not see: csrc/codec/fp8.h as
// their kernels have it.
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdint>

#include "arithmetic.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#undef __forceinline__
#define __forceinline__ inline

#include "codec/fp8.h"

using lar::codec::Fp8;

// `count`: a multiple of 4.
extern "C" void encode(const float* values, int64_t count, float multiplier, uint32_t* codes) {
  for (int64_t i = 0; i < count; i += 4) {
    float four[4];
    std::copy_n(values + i, 4, four);
    codes[i / 4] = Fp8::encode(four, multiplier);
  }
}

// `count`: a multiple of 2.
extern "C" void decode(const uint16_t* codes, int64_t count, float scale, float* values) {
  for (int64_t i = 0; i < count; i += 2) Fp8::decode(codes[i / 2], scale, values[i], values[i + 1]);
}
