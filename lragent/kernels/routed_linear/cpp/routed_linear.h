// Projections of one input, with every agent's adapters, as one call.
//
// Semantics: `lragent.kernels.ops.routed_linears`. Legend: T = tokens, K = input features, N = output features of all
// projections together, R = columns of the down-projections among them, r = an agent's rank, S = kStrip.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "weight_strip.h"

namespace lragent {

// Where an agent's adapter lies: its first column among a down-projection's outputs, its first column in the
// up-projection, and its rank.
struct Route {
  int64_t source, target, rank;
};

struct Up {
  Numbers numbers;  // [features, sum of ranks], with scaling
  int64_t columns = 0;
  int64_t down = 0;           // projection whose outputs it takes
  const int64_t* routes = nullptr;  // [agents + 1, 3]

  Route of(int64_t agent) const { return {routes[3 * agent], routes[3 * agent + 1], routes[3 * agent + 2]}; }
};

struct Projection {
  Numbers weight;
  int64_t features = 0, first = 0;  // rows of its weight, its first column of the output
  std::vector<float> bias;
  int64_t up = -1;
  int64_t low_first = -1;  // its first column of `low`, if it is a down-projection
};

struct LinearCall {
  const float* x = nullptr;  // [T, padded K]
  int64_t tokens = 0, k = 0, columns = 0, low_columns = 0, last_agent = 0;
  std::vector<Projection> projections;
  std::vector<Up> ups;
  std::vector<int64_t> agents;  // [T]
  std::vector<int64_t> present; // agents that occur
  at::Tensor out;               // [T, N]
  at::Tensor low;               // [T, R] floats: outputs of down-projections
};

// A strip of one projection.
struct Strip {
  int64_t projection, first;
};

inline std::vector<float> bias_numbers(const at::Tensor& bias, int64_t features) {
  TORCH_CHECK(bias.numel() == features && is_supported(bias.scalar_type()), "a bias must be [", features, "] floats");
  const int64_t size = padded(features) + W;  // whole strips
  std::vector<float> numbers(size);
  to_floats(Numbers(bias), 0, 1, features, features, numbers.data(), size);
  return numbers;
}

// sums[t] += low[t] B^T for the strip's features, for every token by its agent's columns.
inline void add_routed(const LinearCall& call, const Up& up, int64_t first, int64_t count, int64_t token0,
                       int64_t tokens, StripSpace& space, float* sums) {
  const int64_t low_first = call.projections[up.down].low_first;
  const float* low = call.low.const_data_ptr<float>();
  for (int64_t agent : call.present) {
    const Route route = up.of(agent);
    if (route.rank == 0) continue;
    const int64_t rank_pad = padded(route.rank);
    float* rows = at_least(space.up, kStrip * rank_pad);
    float* columns = at_least(space.up_packed, kStrip * rank_pad);
    std::fill_n(rows, kStrip * rank_pad, 0.f);
    to_floats(up.numbers, first * up.columns + route.target, count, route.rank, up.columns, rows, rank_pad);
    transpose(rows, kStrip, rank_pad, columns, kStrip);
    for (int64_t t = 0; t < tokens; ++t) {
      if (call.agents[token0 + t] != agent) continue;
      const float* factors = low + (token0 + t) * call.low_columns + low_first + route.source;
      float* row = sums + t * kStrip;
      Vec left(0.f), right(0.f);
      for (int64_t c = 0; c < route.rank; ++c) {
        const Vec factor(factors[c]);
        left = at::vec::fmadd(factor, Vec::loadu(columns + c * kStrip), left);
        right = at::vec::fmadd(factor, Vec::loadu(columns + c * kStrip + W), right);
      }
      (Vec::loadu(row) + left).store(row);
      (Vec::loadu(row + W) + right).store(row + W);
    }
  }
}

template <typename T>
inline void store_strip(const Vec& left, const Vec& right, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    left.store(to);
    right.store(to + W);
  } else {
    at::vec::convert_from_float<T>(left, right).store(to);
  }
}

// Writes sums plus bias (padded to S, or null) as T, `ld_to` apart.
template <typename T>
inline void store_rows(
    const float* sums, int64_t tokens, int64_t count, const float* bias, T* to, int64_t ld_to) {
  static const float zeros[kStrip] = {};
  if (bias == nullptr) bias = zeros;
  const Vec bias_left = Vec::loadu(bias), bias_right = Vec::loadu(bias + W);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = sums + t * kStrip;
    const Vec left = Vec::loadu(row) + bias_left, right = Vec::loadu(row + W) + bias_right;
    if (count == kStrip) {
      store_strip(left, right, to + t * ld_to);
    } else {
      T numbers[kStrip];
      store_strip(left, right, numbers);
      std::copy_n(numbers, count, to + t * ld_to);
    }
  }
}

// Computes a strip for a block of tokens and writes it.
inline void run_strip(const LinearCall& call, const Strip& strip, int64_t token0, int64_t tokens, StripSpace& space) {
  const Projection& projection = call.projections[strip.projection];
  const int64_t count = std::min(kStrip, projection.features - strip.first);
  const bool last = strip.first + 2 * kStrip > projection.features;
  float* sums = at_least(space.sums, tokens * kStrip);
  strip_products(
      call.x + token0 * padded(call.k), tokens, projection.weight, strip.first, count, call.k, last, space, sums);
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

// Tokens of a block, so that their inputs stay in a core's cache while all strips pass by.
inline int64_t tokens_of_block(int64_t k) { return std::clamp<int64_t>((288 << 10) / (padded(k) * 4) / 6 * 6, 48, 192); }

inline void run_strips(const LinearCall& call, const std::vector<Strip>& strips) {
  const int64_t block = tokens_of_block(call.k), count = static_cast<int64_t>(strips.size());
  const int64_t work = call.tokens * call.k;  // of a strip
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(work, 1));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    static thread_local StripSpace space;
    for (int64_t token = 0; token < call.tokens; token += block) {
      const int64_t tokens = std::min(block, call.tokens - token);
      for (int64_t i = begin; i < end; ++i) run_strip(call, strips[i], token, tokens, space);
    }
  });
}

// Rows of `x` as floats padded to a multiple of W; `held` keeps them if they had to be copied.
inline const float* float_inputs(const at::Tensor& x, int64_t tokens, int64_t k, at::Tensor& held) {
  if (const float* in_place = Numbers(x).floats(0, k)) return in_place;
  const int64_t k_pad = padded(k);
  held = at::empty({tokens, k_pad}, x.options().dtype(at::kFloat));
  float* to = held.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, (1 << 15) / k_pad), [&](int64_t begin, int64_t end) {
    to_floats(Numbers(x), begin * k, end - begin, k, k, to + begin * k_pad, k_pad);
  });
  return to;
}

// Reads the lists that `lragent.kernels.ops.routed_linears` explains.
inline void read_projections(
    LinearCall& call, at::TensorList tensors, at::IntArrayRef bias_of, at::IntArrayRef up_of, at::IntArrayRef down_of,
    at::IntArrayRef routes) {
  TORCH_CHECK(!routes.empty() && routes[0] >= 0, "routes must start with the number of agents");
  call.last_agent = routes[0];
  const size_t table = (routes[0] + 1) * 3;
  const auto count = static_cast<int64_t>(bias_of.size()), held = static_cast<int64_t>(tensors.size());
  TORCH_CHECK(count <= held && up_of.size() == bias_of.size() && down_of.size() == bias_of.size(),
      "bias_of, up_of and down_of must have one entry a projection");
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& weight = tensors[i];
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == call.k && weight.is_contiguous(),
        "weight ", weight.sizes(), " must be contiguous [features, ", call.k, "]");
    TORCH_CHECK(is_supported(weight.scalar_type()), "unsupported dtype ", weight.scalar_type(), " of a weight");
    TORCH_CHECK(bias_of[i] < held && up_of[i] < held && down_of[i] < count, "a place is outside of its list");
    Projection projection{Numbers(weight), weight.size(0), call.columns, {}, -1, -1};
    if (bias_of[i] >= 0) projection.bias = bias_numbers(tensors[bias_of[i]], projection.features);
    if (up_of[i] >= 0) {
      const at::Tensor& up = tensors[up_of[i]];
      TORCH_CHECK(down_of[i] >= 0, "an up-projection needs a down-projection");
      TORCH_CHECK(up.dim() == 2 && up.is_contiguous() && is_supported(up.scalar_type()) &&
          up.size(0) == projection.features, "an up-projection must be contiguous [features, ranks] floats");
      projection.up = static_cast<int64_t>(call.ups.size());
      const size_t first = 1 + call.ups.size() * table;
      TORCH_CHECK(routes.size() >= first + table, "routes must hold [agents + 1, 3] an up-projection");
      call.ups.push_back({Numbers(up), up.size(1), down_of[i], routes.data() + first});
    }
    call.columns += projection.features;
    call.projections.push_back(std::move(projection));
  }
  for (const Up& up : call.ups) {
    Projection& down = call.projections[up.down];
    if (down.low_first >= 0) continue;
    down.low_first = call.low_columns;
    call.low_columns += down.features;
  }
}

inline void read_agents(LinearCall& call, const at::Tensor& agent_ids) {
  TORCH_CHECK(agent_ids.scalar_type() == at::kLong && agent_ids.numel() == call.tokens, "agent_ids must be int64 [T]");
  const at::Tensor ids = agent_ids.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  call.agents.assign(id, id + call.tokens);
  std::vector<bool> seen(call.last_agent + 1);
  for (int64_t agent : call.agents) {
    TORCH_CHECK_INDEX(agent >= 0 && agent <= call.last_agent, "agent id ", agent, " is outside of 0..", call.last_agent);
    if (!seen[agent]) call.present.push_back(agent);
    seen[agent] = true;
  }
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
  call.x = float_inputs(inputs, call.tokens, call.k, held);
  std::vector<Strip> downs, others;
  for (size_t i = 0; i < call.projections.size(); ++i) {
    const Projection& projection = call.projections[i];
    for (int64_t first = 0; first < projection.features; first += kStrip) {
      (projection.low_first >= 0 ? downs : others).push_back({static_cast<int64_t>(i), first});
    }
  }
  run_strips(call, downs);
  run_strips(call, others);
  return call.out;
}

}  // namespace lragent
