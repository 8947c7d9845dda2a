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

// Rows of one projection that are computed together: `count` from `first` on and, if they are read as streams, as many
// from each of three more places, `apart` from each other.
struct Strip {
  int64_t projection, first, count;
  int64_t apart = 0;

  int64_t parts() const { return apart > 0 ? kStreams : 1; }
};

inline Next memory_of(const LinearCall& call, const Strip& strip) {
  return rows_from(call.projections[strip.projection].weight, strip.first, strip.count, call.k);
}

// Cuts a projection into strips.
inline void add_strips(const LinearCall& call, int64_t index, std::vector<Strip>& strips) {
  const Projection& projection = call.projections[index];
  const int64_t features = projection.features, stream = features / kStreams, threads = at::get_num_threads();
  if (stream < W || features % kStreams != 0 || !reads_streams(call.x, call.tokens, call.k)) {
    for (int64_t first = 0; first < features; first += kStrip) {
      strips.push_back({index, first, std::min(kStrip, features - first)});
    }
    return;
  }
  // As many for each thread, of almost the same size.
  const int64_t least = (stream + kStrip - 1) / kStrip;
  const int64_t count = std::min(stream, (least + threads - 1) / threads * threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * stream / count;
    strips.push_back({index, first, (i + 1) * stream / count - first, stream});
  }
}

// Adapters, bias and output of `count` <= S features of a projection from `first` on, for a block of tokens.
inline void finish(
    const LinearCall& call, const Projection& projection, int64_t first, int64_t count, int64_t token0, int64_t tokens,
    StripSpace& space, float* sums, int64_t ld) {
  const int64_t at = token0 * call.columns + projection.first + first;
  const float* bias = projection.bias.empty() ? nullptr : projection.bias.data() + first;
  if (projection.low_first >= 0) {
    float* low = call.low.mutable_data_ptr<float>() + token0 * call.low_columns + projection.low_first + first;
    store_rows(sums, ld, tokens, count, bias, low, call.low_columns);
  }
  if (projection.up >= 0) add_routed(call, call.ups[projection.up], first, count, token0, tokens, space, sums, ld);
  auto store = [&](auto* out) { store_rows(sums, ld, tokens, count, bias, out + at, call.columns); };
  switch (call.out.scalar_type()) {
    case at::kFloat: return store(call.out.mutable_data_ptr<float>());
    case at::kBFloat16: return store(call.out.mutable_data_ptr<at::BFloat16>());
    default: return store(call.out.mutable_data_ptr<at::Half>());
  }
}

// Computes a strip for a block of tokens and writes it.
inline void run_strip(
    const LinearCall& call, const Strip& strip, int64_t token0, int64_t tokens, const Next& next, StripSpace& space) {
  const Projection& projection = call.projections[strip.projection];
  const int64_t parts = strip.parts(), ld = parts * kStrip;
  const Numbers x = call.x.from(token0 * call.x_ld);
  float* sums = at_least(space.sums, tokens * ld);
  for (int64_t part = 0; projection.up >= 0 && part < parts; ++part) {
    ask_for_routed(call, call.ups[projection.up], strip.first + part * strip.apart);
  }
  if (strip.apart > 0) {
    stream_products(x, tokens, projection.weight, strip.first, strip.apart, strip.count, call.k, sums);
  } else {
    strip_products(x, tokens, projection.weight, strip.first, strip.count, call.k, next, space, sums);
  }
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = strip.first + part * strip.apart;
    finish(call, projection, first, strip.count, token0, tokens, space, sums + part * kStrip, ld);
  }
}

inline void run_strips(const LinearCall& call, const std::vector<Strip>& strips) {
  const int64_t block = tokens_of_block(call), count = static_cast<int64_t>(strips.size());
  int64_t rows = 0;
  for (const Strip& strip : strips) rows += strip.parts() * strip.count;
  const int64_t grain = (int64_t{1} << 20) * count / std::max<int64_t>(call.tokens * call.k * rows, 1);
  at::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
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
    add_strips(call, static_cast<int64_t>(i), call.projections[i].low_first >= 0 ? downs : others);
  }
  run_strips(call, downs);
  run_own_strips(call, memory_of(call, others.empty() ? downs.front() : others.front()));
  run_strips(call, others);
  return call.out;
}

}  // namespace lragent
