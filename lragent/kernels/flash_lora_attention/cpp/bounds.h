// Rejects a step whose integers (page ids, lengths, agent ids) would make the kernel access memory outside its tensors.
#pragma once

#include <c10/util/Exception.h>

#include "flash_lora_attention/cpp/work_plan.h"

namespace lragent {

// `pages` = pages of the cache, `agents` = N + 1, `positions` = rows of rope_cos. The checks of `agents` and
// `positions` are skipped if these are -1.
inline void check_bounds(
    const StepView& step, int64_t sequences, int64_t tokens, int64_t pages, int64_t agents, int64_t positions) {
  TORCH_CHECK(step.seq_starts[0] == 0 && step.seq_starts[sequences] == tokens, "seq_starts must end at ", tokens);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = step.context_lens[s], count = step.queries(s);
    const int64_t used = (length + step.page_size - 1) / step.page_size;
    TORCH_CHECK(count >= 0 && count <= length, "sequence ", s, " has ", count, " queries in a context of ", length);
    TORCH_CHECK(used <= step.pages_per_seq, "context ", length, " of sequence ", s, " is longer than its page table");
    TORCH_CHECK(positions < 0 || length <= positions, "context ", length, " is longer than the rotation table");
    for (int64_t m = 0; m < used; ++m) {
      const int64_t page = step.pages(s)[m];
      TORCH_CHECK(page >= 0 && page < pages, "page ", page, " of sequence ", s, " is outside of the cache");
    }
  }
  if (agents < 0) return;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t agent = step.agent_ids[t];
    TORCH_CHECK(agent >= 0 && agent < agents, "token ", t, " is of unknown agent ", agent);
  }
}

}  // namespace lragent
