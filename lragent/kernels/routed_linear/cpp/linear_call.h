// Arguments of one call of `routed_linears`, checked and in the form that all its strips share.
//
// Legend of the kernel: T = tokens, K = input features, N = output features of all projections together, R = width of
// the LR stream (outputs of all down-projections), r = rank of an agent. A down-projection is a stacked lora_A
// [features, K] whose output features are the LR rows of several agents; lora_b is a stacked [sum of ranks, features].
// W = floats per vector register; padded(n) rounds n up to a multiple of W; ld = elements from one row to the next.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <numeric>

#include "vector/float_rows.h"

namespace lragent {

// The adapter of one agent on one projection: its first output feature of the down-projection, its first row of
// lora_b, and its rank.
struct Route {
  int64_t down_first, lora_b_first, rank;
};

// The adapters of all agents on one projection.
struct Adapters {
  TypedPointer lora_b;  // [sum of ranks][features], includes the scaling
  int64_t features = 0;
  const int64_t* routes = nullptr;  // [agents + 1][3]
  int64_t down = 0;                 // index of the down-projection in `tensors`
  // Only this lora_b uses the down-projection. A token then needs the features of its own agent only.
  bool down_is_private = false;
  TypedPointer down_rows;  // [features of the down-projection][K], if private
  int64_t lr_first = 0;    // first channel in the LR stream

  Route of_agent(int64_t agent) const { return {routes[3 * agent], routes[3 * agent + 1], routes[3 * agent + 2]}; }
  // First channel of an agent's LR row in the LR stream.
  int64_t lr_channel(const Route& route) const { return down_is_private ? lr_first : lr_first + route.down_first; }
};

struct Projection {
  TypedPointer weight;              // [features][K]
  int64_t features = 0, first = 0;  // output features, and the first of them among the N of the call
  std::vector<float> bias;          // padded for reads of whole strips; empty: none
  int64_t adapters = -1;            // index in `LinearCall::adapters`
  int64_t lr_first = -1;            // first channel in the LR stream if this is a down-projection
};

struct LinearCall {
  TypedPointer x;                                         // [T][x_ld]: bf16 for the bf16 dot product, else floats
  int64_t x_ld = 0;                                       // K for bf16, padded(K) for floats
  int64_t tokens = 0, k = 0, features = 0, lr_width = 0;  // T, K, N, R
  int64_t last_agent = 0;                                 // largest agent id
  std::vector<Projection> projections;
  std::vector<Adapters> adapters;
  // [T]: tokens ordered by agent; those of agent a are [starts[a], starts[a + 1]), in ascending order.
  std::vector<int64_t> by_agent, starts;
  std::vector<int64_t> present;  // agents that have tokens
  at::Tensor out;                // [T, N]
  at::Tensor lr;                 // [T, R] floats: the LR stream
};

// Tokens of a token block. Their inputs stay in the L2 cache while all strips are multiplied with them.
inline int64_t tokens_of_block(const LinearCall& call) {
  return std::clamp<int64_t>((288 << 10) / call.x.bytes(call.x_ld) / 6 * 6, 48, 192);
}

// A bias [features] as floats, padded so that a whole strip can be read from any feature on.
inline std::vector<float> padded_bias(const at::Tensor& bias, int64_t features) {
  TORCH_CHECK(bias.numel() == features && is_supported(bias.scalar_type()), "a bias must be [", features, "] floats");
  const int64_t size = padded(features) + 2 * W;
  std::vector<float> result(size);
  upcast_rows(TypedPointer(bias), 0, 1, features, features, result.data(), size);
  return result;
}

// Reads a private down-projection `rows` [features, K]. Its part of the LR stream is as wide as the largest rank.
inline void read_private_down(LinearCall& call, Adapters& adapters, const at::Tensor& rows) {
  TORCH_CHECK(
      rows.dim() == 2 && rows.size(1) == call.k && rows.is_contiguous() && is_supported(rows.scalar_type()),
      "a down-projection must be contiguous [features, ", call.k, "] floats");
  int64_t max_rank = 0;
  for (int64_t agent = 0; agent <= call.last_agent; ++agent) {
    const Route route = adapters.of_agent(agent);
    TORCH_CHECK(route.down_first + route.rank <= rows.size(0), "a route is outside of its down-projection");
    max_rank = std::max(max_rank, route.rank);
  }
  adapters.down_rows = TypedPointer(rows);
  adapters.lr_first = call.lr_width;
  call.lr_width += max_rank;
}

// Reads the lists of tensors, indices and routes. Their format is described at `lragent.kernels.ops.routed_linears`.
inline void read_projections(
    LinearCall& call, at::TensorList tensors, at::IntArrayRef bias_of, at::IntArrayRef up_of, at::IntArrayRef down_of,
    at::IntArrayRef routes) {
  TORCH_CHECK(!routes.empty() && routes[0] >= 0, "routes must start with the number of agents");
  call.last_agent = routes[0];
  const size_t routes_size = (routes[0] + 1) * 3;
  const auto count = static_cast<int64_t>(bias_of.size()), tensor_count = static_cast<int64_t>(tensors.size());
  TORCH_CHECK(
      count <= tensor_count && up_of.size() == bias_of.size() && down_of.size() == bias_of.size(),
      "bias_of, up_of and down_of must have one entry per projection");
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& weight = tensors[i];
    TORCH_CHECK(
        weight.dim() == 2 && weight.size(1) == call.k && weight.is_contiguous(), "weight ", weight.sizes(),
        " must be contiguous [features, ", call.k, "]");
    TORCH_CHECK(is_supported(weight.scalar_type()), "unsupported dtype ", weight.scalar_type(), " of a weight");
    TORCH_CHECK(
        bias_of[i] < tensor_count && up_of[i] < tensor_count && down_of[i] < tensor_count,
        "an index is outside of its list");
    Projection projection{TypedPointer(weight), weight.size(0), call.features, {}, -1, -1};
    if (bias_of[i] >= 0) projection.bias = padded_bias(tensors[bias_of[i]], projection.features);
    if (up_of[i] >= 0) {
      const at::Tensor& lora_b = tensors[up_of[i]];
      TORCH_CHECK(down_of[i] >= 0, "an up-projection (lora_b) needs a down-projection");
      TORCH_CHECK(
          lora_b.dim() == 2 && lora_b.is_contiguous() && is_supported(lora_b.scalar_type()) &&
              lora_b.size(1) == projection.features,
          "an up-projection (lora_b) must be contiguous [ranks, features] floats");
      projection.adapters = static_cast<int64_t>(call.adapters.size());
      const size_t first = 1 + call.adapters.size() * routes_size;
      TORCH_CHECK(routes.size() >= first + routes_size, "routes must hold [agents + 1, 3] per up-projection (lora_b)");
      call.adapters.push_back({TypedPointer(lora_b), projection.features, routes.data() + first, down_of[i]});
    }
    call.features += projection.features;
    call.projections.push_back(std::move(projection));
  }
  for (Adapters& adapters : call.adapters) {
    adapters.down_is_private = adapters.down >= count;
    if (adapters.down_is_private) {
      read_private_down(call, adapters, tensors[adapters.down]);
    } else {
      Projection& down = call.projections[adapters.down];
      if (down.lr_first < 0) {
        down.lr_first = call.lr_width;
        call.lr_width += down.features;
      }
      adapters.lr_first = down.lr_first;
    }
  }
}

// Orders the tokens by agent. agent_ids [T].
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
