#include "cpu/norm.h"

#include <algorithm>
#include <vector>

#include "codec/norm.h"
#include "cpu/float_types.h"

namespace lar::cpu {
namespace {

using codec::kFp4Elements;
using codec::kGroupElements;
using codec::kUnitElements;

float total_of_squares(const std::vector<float>& x, std::vector<float>& tree) {
  const size_t units = x.size() / kUnitElements;
  size_t leaves = size_t{codec::kLeastTiles} * codec::kTileUnits;
  while (leaves < units) leaves *= 2;
  tree.assign(leaves, 0.0f);
  for (size_t unit = 0; unit < units; ++unit) {
    float values[kUnitElements];
    std::copy_n(&x[unit * kUnitElements], kUnitElements, values);
    tree[unit] = codec::sum_of_squares(values);
  }
  for (; leaves > 1; leaves /= 2)
    for (size_t i = 0; i < leaves / 2; ++i) tree[i] = codec::add(tree[2 * i], tree[2 * i + 1]);
  return tree[0];
}

// The largest magnitude; NaN where any is.
float largest_of(const float* y, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, codec::bits_of(y[i]) & codec::kMagnitudeMask);
  return codec::from_bits(most);
}

void store_e4m3(const float* y, int64_t count, float scale, uint8_t* codes) {
  const float multiplier = codec::divide(1.0f, scale);
  for (int64_t i = 0; i < count; ++i) codes[i] = codec::to_e4m3(codec::multiply(y[i], multiplier));
}

// Rows of y, one after another.
class Quantizer {
 public:
  Quantizer(const lar_norm& norm, int64_t rows)
      : norm_(norm), scale_stride_(codec::scale_stride(norm, rows)), hidden_(norm.hidden) {
    if (norm.scales == LAR_SCALES_SWIZZLED)
      std::fill_n(static_cast<uint8_t*>(norm.scale_out), (rows + 127) / 128 * 128 * fp4_tiles() * 4, 0);
  }

  void operator()(int64_t row, const float* y) const {
    uint8_t* const codes = static_cast<uint8_t*>(norm_.quant_out) + row * hidden_;
    switch (norm_.quant) {
      case LAR_QUANT_FP8_TENSOR:
        return store_e4m3(y, hidden_, *norm_.scale, codes);
      case LAR_QUANT_FP8_TOKEN: {
        const float scale = codec::token_scale(largest_of(y, hidden_));
        static_cast<float*>(norm_.scale_out)[row] = scale;
        return store_e4m3(y, hidden_, scale, codes);
      }
      case LAR_QUANT_FP8_GROUP:
        for (int64_t group = 0; group * kGroupElements < hidden_; ++group) {
          const int64_t first = group * kGroupElements;
          store_e4m3(y + first, kGroupElements, group_scale(row, group, largest_of(y + first, kGroupElements)),
                     codes + first);
        }
        return;
      case LAR_QUANT_NVFP4:
        for (int64_t group = 0; group * kFp4Elements < hidden_; ++group) quantize_fp4(row, group, y);
        return;
      default:
        return;
    }
  }

 private:
  int64_t fp4_tiles() const { return (hidden_ / kFp4Elements + 3) / 4; }

  // Stores the scale; what it says.
  float group_scale(int64_t row, int64_t group, float largest) const {
    const int64_t groups = hidden_ / kGroupElements;
    const float scale = codec::group_scale(largest);
    if (norm_.scales == LAR_SCALES_UE8M0) {
      const uint32_t exponent = codec::exponent_above(scale);
      uint8_t* word = static_cast<uint8_t*>(norm_.scale_out) + 4 * (group / 4 * scale_stride_ + row);
      word[group % 4] = static_cast<uint8_t>(exponent);
      if (group + 1 == groups)
        for (int64_t absent = group % 4 + 1; absent < 4; ++absent) word[absent] = 0;
      return codec::power_of_two(exponent);
    }
    const int64_t place = norm_.scales == LAR_SCALES_COLUMNS ? group * scale_stride_ + row : row * groups + group;
    static_cast<float*>(norm_.scale_out)[place] = scale;
    return scale;
  }

  void quantize_fp4(int64_t row, int64_t group, const float* y) const {
    const float* values = y + group * kFp4Elements;
    const uint8_t scale = codec::fp4_scale(largest_of(values, kFp4Elements), *norm_.scale);
    const int64_t place = norm_.scales == LAR_SCALES_SWIZZLED ? (row / 128 * fp4_tiles() + group / 4) * 512 +
                                                                    row % 32 * 16 + row % 128 / 32 * 4 + group % 4
                                                              : row * (hidden_ / kFp4Elements) + group;
    static_cast<uint8_t*>(norm_.scale_out)[place] = scale;
    const float multiplier = codec::fp4_multiplier(scale, *norm_.scale);
    uint8_t* codes = static_cast<uint8_t*>(norm_.quant_out) + (row * hidden_ + group * kFp4Elements) / 2;
    for (int i = 0; i < kFp4Elements; i += 2) {
      const uint32_t low = codec::to_e2m1(codec::multiply(values[i], multiplier));
      const uint32_t high = codec::to_e2m1(codec::multiply(values[i + 1], multiplier));
      codes[i / 2] = static_cast<uint8_t>(low | high << 4);
    }
  }

  const lar_norm& norm_;
  const int64_t scale_stride_;
  const int64_t hidden_;
};

template <typename Type>
void norm_rows(const lar_message& message, const lar_norm& norm) {
  using Storage = typename Type::Storage;
  const int64_t hidden = norm.hidden;
  const int64_t rows = message.count / hidden;
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  const auto* const weight = static_cast<const Storage*>(norm.weight);
  const Quantizer quantize(norm, rows);
  std::vector<float> x(hidden);
  std::vector<float> tree;
  for (int64_t row = 0; row < rows; ++row) {
    const auto* const sums = static_cast<const Storage*>(message.input) + row * hidden;
    const auto* const residual = norm.residual ? static_cast<const Storage*>(norm.residual) + row * hidden : nullptr;
    auto* const residual_out = static_cast<Storage*>(message.output) + row * hidden;
    for (int64_t i = 0; i < hidden; ++i) {
      Storage r = sums[i];
      if (residual) r = Type::round(codec::add(Type::widen(r), Type::widen(residual[i])));
      residual_out[i] = r;
      x[i] = Type::widen(r);
    }
    const float inverse = codec::inverse_of_norm(total_of_squares(x, tree), inverse_hidden, norm.eps);
    auto* const norm_out = norm.norm_out ? static_cast<Storage*>(norm.norm_out) + row * hidden : nullptr;
    for (int64_t i = 0; i < hidden; ++i) {
      const float factor = codec::add(Type::widen(weight[i]), norm.weight_bias);
      const Storage y = Type::round(codec::normed(x[i], inverse, factor));
      if (norm_out) norm_out[i] = y;
      x[i] = Type::widen(y);
    }
    quantize(row, x.data());
  }
}

}  // namespace

void rms_norm(const lar_message& message, const lar_norm& norm) {
  switch (message.dtype) {
    case LAR_FLOAT32:
      return norm_rows<Float32>(message, norm);
    case LAR_FLOAT16:
      return norm_rows<Float16>(message, norm);
    case LAR_BFLOAT16:
      return norm_rows<BFloat16>(message, norm);
  }
}

}  // namespace lar::cpu
