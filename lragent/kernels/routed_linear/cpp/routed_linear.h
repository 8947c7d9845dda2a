// Projections of one input, with every agent's adapters, as one call.
//
// Semantics: `lragent.kernels.ops.routed_linears`. Legend: T = tokens, K = input features, N = output features of all
// projections together, R = columns of the down-projections among them, r = an agent's rank, S = kStrip.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>

#include <numeric>

#include "weight_strip.h"

namespace lragent {

// Tokens from which oneDNN's bfloat16 products pay for bringing a weight into its layout.
constexpr int64_t kTokensForOneDnn = 64;

// Where an agent's adapter lies: its first column among a down-projection's outputs, its first column in the
// up-projection, and its rank.
struct Route {
  int64_t source, target, rank;
};

struct Up {
  Numbers numbers;  // [sum of ranks, features], with scaling
  int64_t features = 0;
  const int64_t* routes = nullptr;  // [agents + 1, 3]
  int64_t down = 0;    // place of its down-projection among the tensors
  bool own = false;    // whether nobody else takes that: then a token's own agent's columns are computed only
  Numbers down_rows;   // [columns of all agents, K], if `own`
  int64_t low_first = 0;  // its first column of `low`

  Route of(int64_t agent) const { return {routes[3 * agent], routes[3 * agent + 1], routes[3 * agent + 2]}; }
  int64_t low_column(const Route& route) const { return own ? low_first : low_first + route.source; }
};

struct Projection {
  Numbers weight;
  int64_t features = 0, first = 0;  // rows of its weight, its first column of the output
  std::vector<float> bias;
  int64_t up = -1;
  int64_t low_first = -1;  // its first column of `low`, if it is a down-projection
  at::Tensor product;      // x @ weight.T, [T, features], if oneDNN computed it
};

struct LinearCall {
  const float* x = nullptr;  // [T, padded K]
  int64_t tokens = 0, k = 0, columns = 0, low_columns = 0, last_agent = 0;
  std::vector<Projection> projections;
  std::vector<Up> ups;
  // Tokens by agent, each agent's in their order; those of agent a are [starts[a], starts[a + 1]).
  std::vector<int64_t> by_agent, starts;
  std::vector<int64_t> present;  // agents that have tokens
  at::Tensor out;               // [T, N]
  at::Tensor low;               // [T, R] floats: outputs of down-projections, or own columns of them
};

// A strip of one projection.
struct Strip {
  int64_t projection, first;
};

// A strip of one agent's columns of a down-projection, for tokens [begin, end) of `by_agent`.
struct OwnStrip {
  int64_t up, begin, end, row, count, column;
};

inline std::vector<float> bias_numbers(const at::Tensor& bias, int64_t features) {
  TORCH_CHECK(bias.numel() == features && is_supported(bias.scalar_type()), "a bias must be [", features, "] floats");
  const int64_t size = padded(features) + W;  // whole strips
  std::vector<float> numbers(size);
  to_floats(Numbers(bias), 0, 1, features, features, numbers.data(), size);
  return numbers;
}

// Asks for what `add_routed` reads: it lies in as many places as there are ranks.
inline void ask_for_routed(const LinearCall& call, const Up& up, int64_t first) {
  for (int64_t agent : call.present) {
    const Route route = up.of(agent);
    for (int64_t c = 0; c < route.rank; ++c) __builtin_prefetch(up.numbers.at((route.target + c) * up.features + first));
  }
}

// sums[t] += low[t] B for the strip's features, for every token by its agent's columns.
inline void add_routed(const LinearCall& call, const Up& up, int64_t first, int64_t count, int64_t token0,
                       int64_t tokens, StripSpace& space, float* sums) {
  const float* low = call.low.const_data_ptr<float>();
  for (int64_t agent : call.present) {
    const Route route = up.of(agent);
    const int64_t *end = call.by_agent.data() + call.starts[agent + 1],
                  *token = std::lower_bound(call.by_agent.data() + call.starts[agent], end, token0);
    if (route.rank == 0 || token == end || *token >= token0 + tokens) continue;
    const int64_t element = route.target * up.features + first;
    const float* rows = count == kStrip ? up.numbers.floats(element, kStrip) : nullptr;
    const int64_t apart = rows == nullptr ? kStrip : up.features;
    if (rows == nullptr) {
      float* extended = at_least(space.up, route.rank * kStrip);
      to_floats(up.numbers, element, route.rank, count, up.features, extended, kStrip);
      rows = extended;
    }
    while (token != end && *token < token0 + tokens) {
      const int64_t begin = *token++;  // of tokens that follow each other
      while (token != end && *token == token[-1] + 1 && *token < token0 + tokens) ++token;
      product<true>(
          low + begin * call.low_columns + up.low_column(route), call.low_columns, rows, apart,
          sums + (begin - token0) * kStrip, kStrip, token[-1] + 1 - begin, kStrip, route.rank);
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
  if (projection.product.defined()) {
    const int64_t element = token0 * projection.features + strip.first;
    to_floats(Numbers(projection.product), element, tokens, count, projection.features, sums, kStrip);
  } else {
    strip_products(
        call.x + token0 * padded(call.k), tokens, projection.weight, strip.first, count, call.k, next, space, sums);
  }
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
      for (int64_t i = begin; i < end; ++i) {
        run_strip(call, strips[i], token, tokens, memory_of(call, strips[i + 1 < end ? i + 1 : begin]), space);
      }
    }
  });
}

// Inputs of tokens, side by side: where they lie if they follow each other, or copied.
inline const float* gathered(const LinearCall& call, const int64_t* begin, const int64_t* end, StripSpace& space) {
  const int64_t k_pad = padded(call.k), tokens = end - begin;
  if (end[-1] - *begin == tokens - 1) return call.x + *begin * k_pad;
  float* rows = at_least(space.inputs, tokens * k_pad);
  for (int64_t i = 0; i < tokens; ++i) std::copy_n(call.x + begin[i] * k_pad, k_pad, rows + i * k_pad);
  return rows;
}

// An own strip's columns of `low`.
inline void run_own_strip(const LinearCall& call, const OwnStrip& strip, const Next& next, StripSpace& space) {
  const int64_t tokens = strip.end - strip.begin, *token = call.by_agent.data() + strip.begin;
  float* sums = at_least(space.sums, tokens * kStrip);
  strip_products(
      gathered(call, token, token + tokens, space), tokens, call.ups[strip.up].down_rows, strip.row, strip.count,
      call.k, next, space, sums);
  float* low = call.low.mutable_data_ptr<float>() + strip.column;
  for (int64_t i = 0; i < tokens; ++i) {
    store_rows(sums + i * kStrip, 1, strip.count, nullptr, low + token[i] * call.low_columns, call.low_columns);
  }
}

inline std::vector<OwnStrip> own_strips(const LinearCall& call) {
  std::vector<OwnStrip> strips;
  const int64_t block = tokens_of_block(call.k);
  for (int64_t i = 0; i < static_cast<int64_t>(call.ups.size()); ++i) {
    const Up& up = call.ups[i];
    if (!up.own) continue;
    for (int64_t agent : call.present) {
      const Route route = up.of(agent);
      for (int64_t begin = call.starts[agent]; begin < call.starts[agent + 1]; begin += block) {
        const int64_t end = std::min(begin + block, call.starts[agent + 1]);
        for (int64_t c = 0; c < route.rank; c += kStrip) {
          strips.push_back(
              {i, begin, end, route.source + c, std::min(kStrip, route.rank - c), up.low_first + c});
        }
      }
    }
  }
  return strips;
}

// Computes all own strips; `then` is read after them.
inline void run_own_strips(const LinearCall& call, const Next& then) {
  const std::vector<OwnStrip> strips = own_strips(call);
  const int64_t count = static_cast<int64_t>(strips.size());
  if (count == 0) return;
  int64_t work = 0;
  for (const OwnStrip& strip : strips) work += (strip.end - strip.begin) * call.k;
  at::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) * count / std::max<int64_t>(work, 1)),
      [&](int64_t begin, int64_t end) {
        static thread_local StripSpace space;
        for (int64_t i = begin; i < end; ++i) {
          const OwnStrip& after = strips[std::min(i + 1, count - 1)];
          const Next next = rows_from(call.ups[after.up].down_rows, after.row, after.count, call.k);
          run_own_strip(call, strips[i], i + 1 < end ? next : then, space);
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

// A down-projection that only one up-projection takes: `low` holds as many columns as the agent with most of them has.
inline void read_own_down(LinearCall& call, Up& up, const at::Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == call.k && rows.is_contiguous() && is_supported(rows.scalar_type()),
      "a down-projection must be contiguous [columns, ", call.k, "] floats");
  int64_t most = 0;
  for (int64_t agent = 0; agent <= call.last_agent; ++agent) {
    const Route route = up.of(agent);
    TORCH_CHECK(route.source + route.rank <= rows.size(0), "a route is outside of its down-projection");
    most = std::max(most, route.rank);
  }
  up.down_rows = Numbers(rows);
  up.low_first = call.low_columns;
  call.low_columns += most;
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
    TORCH_CHECK(bias_of[i] < held && up_of[i] < held && down_of[i] < held, "a place is outside of its list");
    Projection projection{Numbers(weight), weight.size(0), call.columns, {}, -1, -1};
    if (bias_of[i] >= 0) projection.bias = bias_numbers(tensors[bias_of[i]], projection.features);
    if (up_of[i] >= 0) {
      const at::Tensor& up = tensors[up_of[i]];
      TORCH_CHECK(down_of[i] >= 0, "an up-projection needs a down-projection");
      TORCH_CHECK(up.dim() == 2 && up.is_contiguous() && is_supported(up.scalar_type()) &&
          up.size(1) == projection.features, "an up-projection must be contiguous [ranks, features] floats");
      projection.up = static_cast<int64_t>(call.ups.size());
      const size_t first = 1 + call.ups.size() * table;
      TORCH_CHECK(routes.size() >= first + table, "routes must hold [agents + 1, 3] an up-projection");
      call.ups.push_back({Numbers(up), projection.features, routes.data() + first, down_of[i]});
    }
    call.columns += projection.features;
    call.projections.push_back(std::move(projection));
  }
  for (Up& up : call.ups) {
    up.own = up.down >= count;
    if (up.own) {
      read_own_down(call, up, tensors[up.down]);
    } else {
      Projection& down = call.projections[up.down];
      if (down.low_first < 0) {
        down.low_first = call.low_columns;
        call.low_columns += down.features;
      }
      up.low_first = down.low_first;
    }
  }
}

inline void read_agents(LinearCall& call, const at::Tensor& agent_ids) {
  TORCH_CHECK(agent_ids.scalar_type() == at::kLong && agent_ids.numel() == call.tokens, "agent_ids must be int64 [T]");
  const at::Tensor ids = agent_ids.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  call.starts.assign(call.last_agent + 2, 0);
  for (int64_t t = 0; t < call.tokens; ++t) {
    TORCH_CHECK_INDEX(
        id[t] >= 0 && id[t] <= call.last_agent, "agent id ", id[t], " is outside of 0..", call.last_agent);
    ++call.starts[id[t] + 1];
  }
  std::partial_sum(call.starts.begin(), call.starts.end(), call.starts.begin());
  std::vector<int64_t> next(call.starts);
  call.by_agent.resize(call.tokens);
  for (int64_t t = 0; t < call.tokens; ++t) call.by_agent[next[id[t]]++] = t;
  for (int64_t agent = 0; agent <= call.last_agent; ++agent) {
    if (call.starts[agent] < call.starts[agent + 1]) call.present.push_back(agent);
  }
}

// Where the processor multiplies bfloat16 (about twice as fast as floats), oneDNN does so for many tokens.
inline void multiply_bfloat16(LinearCall& call, const at::Tensor& x, at::TensorList weights) {
  static const bool can = __builtin_cpu_supports("avx512bf16");
  if (!can || x.scalar_type() != at::kBFloat16 || call.tokens < kTokensForOneDnn) return;
  const at::Tensor rows = x.reshape({call.tokens, call.k});
  for (size_t i = 0; i < call.projections.size(); ++i) {
    Projection& projection = call.projections[i];
    if (projection.low_first >= 0 || weights[i].scalar_type() != at::kBFloat16) continue;
    projection.product = at::linear(rows, weights[i]);
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
  multiply_bfloat16(call, inputs, tensors);
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
