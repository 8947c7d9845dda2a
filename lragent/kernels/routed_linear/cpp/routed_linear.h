// Projections of one input, with every agent's adapters, as one call.
//
// Semantics: `lragent.kernels.ops.routed_linears`. Legend: T = tokens, K = input features, N = output features of all
// projections together, R = columns of the down-projections among them, r = an agent's rank, S = kStrip.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "adapter_columns.h"

namespace lragent {

// A strip of one projection.
struct Strip {
  int64_t projection, first;
};

inline int64_t rows_of(const LinearCall& call, const Strip& strip) {
  return std::min(kStrip, call.projections[strip.projection].features - strip.first);
}

inline Next memory_of(const LinearCall& call, const Strip& strip) {
  return rows_from(call.projections[strip.projection].weight, strip.first, rows_of(call, strip), call.k);
}

// Computes a strip for a block of tokens and writes it.
inline void run_strip(
    const LinearCall& call, const Strip& strip, int64_t token0, int64_t tokens, const Next& next, StripSpace& space) {
  const Projection& projection = call.projections[strip.projection];
  const int64_t count = rows_of(call, strip);
  float* sums = at_least(space.sums, tokens * kStrip);
  if (projection.up >= 0) ask_for_routed(call, call.ups[projection.up], strip.first);
  strip_products(
      call.x.from(token0 * call.x_ld), tokens, projection.weight, strip.first, count, call.k, next, space, sums);
  const int64_t column = projection.first + strip.first, at = token0 * call.columns + column;
  const float* bias = projection.bias.empty() ? nullptr : projection.bias.data() + strip.first;
  if (projection.low_first >= 0) {
    float* low = call.low.mutable_data_ptr<float>() + token0 * call.low_columns + projection.low_first + strip.first;
    store_rows(sums, tokens, count, bias, low, call.low_columns);
  }
  if (projection.up >= 0) add_routed(call, call.ups[projection.up], strip.first, count, token0, tokens, space, sums);
  switch (call.out.scalar_type()) {
    case at::kFloat: return store_rows(sums, tokens, count, bias, call.out.mutable_data_ptr<float>() + at, call.columns);
    case at::kBFloat16:
      return store_rows(sums, tokens, count, bias, call.out.mutable_data_ptr<at::BFloat16>() + at, call.columns);
    default: return store_rows(sums, tokens, count, bias, call.out.mutable_data_ptr<at::Half>() + at, call.columns);
  }
}

inline void run_strips(const LinearCall& call, const std::vector<Strip>& strips) {
  const int64_t block = tokens_of_block(call), count = static_cast<int64_t>(strips.size());
  const int64_t work = call.tokens * call.k;  // of a strip
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(work, 1));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    static thread_local StripSpace space;
    for (int64_t token = 0; token < call.tokens; token += block) {
      const int64_t tokens = std::min(block, call.tokens - token);
      for (int64_t i = begin; i < end; ++i) {
        run_strip(call, strips[i], token, tokens, memory_of(call, strips[i + 1 < end ? i + 1 : begin]), space);
      }
    }
  });
}

// Whether all that multiplies the inputs does so in pairs.
inline bool multiplies_in_pairs(const LinearCall& call, const at::Tensor& x) {
  auto fits = [&](const Numbers& rows) { return multiplies_in_pairs(Numbers(x), rows, call.k); };
  return std::all_of(
             call.projections.begin(), call.projections.end(), [&](const auto& each) { return fits(each.weight); }) &&
      std::all_of(call.ups.begin(), call.ups.end(), [&](const Up& up) { return !up.own || fits(up.down_rows); });
}

// Gives the call its inputs: where they lie, or as floats padded to a multiple of W, which `held` keeps.
inline void read_inputs(LinearCall& call, const at::Tensor& x, at::Tensor& held) {
  call.x = Numbers(x);
  call.x_ld = call.k;
  if (multiplies_in_pairs(call, x) || call.x.floats(0, call.k) != nullptr) return;
  const Numbers numbers = call.x;
  call.x_ld = padded(call.k);
  held = at::empty({call.tokens, call.x_ld}, x.options().dtype(at::kFloat));
  call.x = Numbers(held);
  float* to = held.mutable_data_ptr<float>();
  at::parallel_for(0, call.tokens, std::max<int64_t>(1, (1 << 15) / call.x_ld), [&](int64_t begin, int64_t end) {
    to_floats(numbers, begin * call.k, end - begin, call.k, call.k, to + begin * call.x_ld, call.x_ld);
  });
}

inline at::Tensor routed_linears(
    const at::Tensor& x, const at::Tensor& agent_ids, at::TensorList tensors, at::IntArrayRef bias_of,
    at::IntArrayRef up_of, at::IntArrayRef down_of, at::IntArrayRef routes) {
  TORCH_CHECK(x.dim() >= 1 && is_supported(x.scalar_type()), "the input must be floats [..., K]");
  LinearCall call;
  call.k = x.size(-1);
  call.tokens = call.k == 0 ? 0 : x.numel() / call.k;
  read_projections(call, tensors, bias_of, up_of, down_of, routes);
  const at::Tensor inputs = x.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = call.columns;
  call.out = at::empty(sizes, x.options());
  if (call.tokens == 0) return call.out;
  if (!call.ups.empty()) {
    read_agents(call, agent_ids);
    call.low = at::empty({call.tokens, call.low_columns}, x.options().dtype(at::kFloat));
  }
  at::Tensor held;
  read_inputs(call, inputs, held);
  std::vector<Strip> downs, others;
  for (size_t i = 0; i < call.projections.size(); ++i) {
    const Projection& projection = call.projections[i];
    for (int64_t first = 0; first < projection.features; first += kStrip) {
      (projection.low_first >= 0 ? downs : others).push_back({static_cast<int64_t>(i), first});
    }
  }
  run_strips(call, downs);
  run_own_strips(call, memory_of(call, others.empty() ? downs.front() : others.front()));
  run_strips(call, others);
  return call.out;
}

}  // namespace lragent
