// What a call of `routed_linears` computes, read from its arguments.
//
// Legend: T = tokens, K = input features, N = output features of all projections together, R = columns of `low`.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <numeric>

#include "../../vector/float_rows.h"

namespace lragent {

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
};

struct LinearCall {
  Numbers x;          // [T, x_ld]: bfloat16 numbers if they are multiplied in pairs, else floats
  int64_t x_ld = 0;   // K, padded for floats
  int64_t tokens = 0, k = 0, columns = 0, low_columns = 0, last_agent = 0;
  std::vector<Projection> projections;
  std::vector<Up> ups;
  // Tokens by agent, each agent's in their order; those of agent a are [starts[a], starts[a + 1]).
  std::vector<int64_t> by_agent, starts;
  std::vector<int64_t> present;  // agents that have tokens
  at::Tensor out;               // [T, N]
  at::Tensor low;               // [T, R] floats: outputs of down-projections, or own columns of them
};

// Tokens of a block, so that their inputs stay in a core's cache while all strips pass by.
inline int64_t tokens_of_block(const LinearCall& call) {
  return std::clamp<int64_t>((288 << 10) / call.x.bytes(call.x_ld) / 6 * 6, 48, 192);
}

inline std::vector<float> bias_numbers(const at::Tensor& bias, int64_t features) {
  TORCH_CHECK(bias.numel() == features && is_supported(bias.scalar_type()), "a bias must be [", features, "] floats");
  const int64_t size = padded(features) + 2 * W;  // whole strips, wherever they begin
  std::vector<float> numbers(size);
  to_floats(Numbers(bias), 0, 1, features, features, numbers.data(), size);
  return numbers;
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

}  // namespace lragent
