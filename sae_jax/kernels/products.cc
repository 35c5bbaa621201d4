// Products with k-sparse codes on a CPU, for XLA: what kernels/loops.py and kernels/rows.py compute, in the same order of sums.
//
// The reconstruction of a token and the gradients of a latent stay in the nearest cache while all that belongs to them is
// added. A code of 0 is passed over. XLA adds 0 times the row, which is another sum where the row is not finite, or where the
// sum so far is -0. An index out of range reads the nearest row and adds to none, as in XLA.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "blocks.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTokens = 16, kLatents = 16;  // of a block
constexpr int64_t kAhead = 2;                   // slots whose row is fetched before it is needed

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// a * b + c as XLA's decode rounds it: once where the CPU can.
inline float MultiplyAdd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#elif defined(__x86_64__)
  return a * b + c;
#else
#error "it is not known how XLA rounds here; its own loops are taken"
#endif
}

template <typename Buffer>
bool Is(const Buffer& buffer, int64_t rows, int64_t columns) {
  const auto shape = buffer.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

// Negative ones count from the end, as in numpy. The result may be out of range.
int64_t Latent(int32_t f, int64_t n) { return f < 0 ? f + n : f; }

ffi::Error Decode(ffi::ThreadPool pool, Floats z, Ints latents, Floats w, Ints slots, ffi::ResultBuffer<ffi::F32> x) {
  if (latents.dimensions().size() != 2 || w.dimensions().size() != 2 || slots.element_count() != 1) {
    return ffi::Error::InvalidArgument("latents [B, K], w [F, D] and a number of slots");
  }
  const int64_t tokens = latents.dimensions()[0], k = latents.dimensions()[1];
  const int64_t n = w.dimensions()[0], width = w.dimensions()[1];
  if (n == 0 || !Is(z, tokens, k) || !Is(*x, tokens, width)) return ffi::Error::InvalidArgument("z [B, K] and x [B, D]");
  const int64_t used = std::min<int64_t>(k, slots.typed_data()[0]);
  const float *values = z.typed_data(), *rows = w.typed_data();
  const int32_t* of = latents.typed_data();
  float* made = x->typed_data();
  InBlocks(pool, (tokens + kTokens - 1) / kTokens, [=] {
    return [=](int64_t block) {
      for (int64_t b = block * kTokens; b < std::min(tokens, (block + 1) * kTokens); ++b) {
        float* __restrict sum = made + b * width;
        std::memset(sum, 0, width * sizeof(float));
        for (int64_t j = b * k; j < b * k + used; ++j) {
          if (j + kAhead < b * k + used) {
            const float* next = rows + std::clamp<int64_t>(Latent(of[j + kAhead], n), 0, n - 1) * width;
            for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(next + d);
          }
          const float value = values[j];
          const float* __restrict row = rows + std::clamp<int64_t>(Latent(of[j], n), 0, n - 1) * width;
          if (value == 0) continue;
          for (int64_t d = 0; d < width; ++d) sum[d] = MultiplyAdd(value, row[d], sum[d]);
        }
      }
    };
  });
  return ffi::Error::Success();
}

// Adds values * rows to a matrix, at the codes [first, end) of one latent.
void Add(float* __restrict sum, const float* values, const float* rows, const int64_t* first, const int64_t* end, int64_t k,
         int64_t width) {
  for (; first < end; ++first) {
    const float value = values[*first];
    const float* __restrict row = rows + *first / k * width;
    if (value == 0) continue;
    for (int64_t d = 0; d < width; ++d) sum[d] += value * row[d];  // rounded twice, as XLA's scatter does
  }
}

// A latent's codes are added in the order: block of `together` slots, token, slot. Those out of range are left out.
ffi::Error AddWeightGradients(ffi::ThreadPool pool, Floats enc, Floats dec, Ints latents, Floats dz, Floats x, Floats z, Floats g,
                              Ints slots, ffi::ResultBuffer<ffi::F32> enc_out, ffi::ResultBuffer<ffi::F32> dec_out,
                              int64_t together) {
  if (latents.dimensions().size() != 2 || dec.dimensions().size() != 2 || slots.element_count() != 1 || together < 1) {
    return ffi::Error::InvalidArgument("latents [B, K], gradients [F, D], a number of slots, and one or more together");
  }
  const int64_t tokens = latents.dimensions()[0], k = latents.dimensions()[1];
  const int64_t n = dec.dimensions()[0], width = dec.dimensions()[1];
  if (!Is(enc, n, width) || !Is(dz, tokens, k) || !Is(z, tokens, k) || !Is(x, tokens, width) || !Is(g, tokens, width)) {
    return ffi::Error::InvalidArgument("both gradients [F, D], dz and z [B, K], x and g [B, D]");
  }
  if (enc_out->typed_data() != enc.typed_data() || dec_out->typed_data() != dec.typed_data()) {
    return ffi::Error::InvalidArgument("gradients are added in place");
  }
  // Whole blocks: the codes from `slots` on are 0.
  const int64_t blocks = (std::clamp<int64_t>(slots.typed_data()[0], 0, k) + together - 1) / together;
  const int64_t used = std::min(k, blocks * together);
  const int32_t* of = latents.typed_data();
  // A counting sort: the codes of latent f are code[start[f]] to code[start[f + 1]].
  std::vector<int64_t> start(n + 1), next, code(tokens * used);
  for (int64_t b = 0; b < tokens; ++b) {
    for (int64_t j = 0; j < used; ++j) {
      if (const int64_t f = Latent(of[b * k + j], n); 0 <= f && f < n) ++start[f + 1];
    }
  }
  for (int64_t f = 0; f < n; ++f) start[f + 1] += start[f];
  next.assign(start.begin(), start.end() - 1);
  for (int64_t first = 0; first < used; first += together) {
    for (int64_t b = 0; b < tokens; ++b) {
      for (int64_t j = first; j < std::min(used, first + together); ++j) {
        if (const int64_t f = Latent(of[b * k + j], n); 0 <= f && f < n) code[next[f]++] = b * k + j;
      }
    }
  }
  const float *dzs = dz.typed_data(), *xs = x.typed_data(), *zs = z.typed_data(), *gs = g.typed_data();
  float *encs = enc_out->typed_data(), *decs = dec_out->typed_data();
  InBlocks(pool, (n + kLatents - 1) / kLatents, [&] {
    return [&](int64_t block) {
      for (int64_t f = block * kLatents; f < std::min(n, (block + 1) * kLatents); ++f) {
        const int64_t *first = code.data() + start[f], *end = code.data() + start[f + 1];
        Add(encs + f * width, dzs, xs, first, end, k, width);
        Add(decs + f * width, zs, gs, first, end, k, width);
      }
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sae_jax_decode, Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sae_jax_add_weight_gradients, AddWeightGradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("together"));
