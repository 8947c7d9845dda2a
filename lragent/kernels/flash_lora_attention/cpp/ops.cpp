// Registers the C++ kernels under the names that `lragent.kernels.cpp_library` expects.
#include <torch/library.h>

#include "attention.h"

TORCH_LIBRARY_FRAGMENT(lragent, m) {
  m.def(
      "flash_lora_attention_cpp(Tensor query_THqDk, Tensor k_cache, Tensor v_cache, Tensor agent_ids_T, "
      "Tensor seq_starts, Tensor context_lens_S, Tensor page_table_SM, Tensor? lr_k, Tensor? lr_k_table, Tensor? b_k, "
      "Tensor? lr_v, Tensor? lr_v_table, Tensor? b_v, Tensor? rope_cos, Tensor? rope_sin, Tensor? rope_partner, "
      "Tensor? norm_weight, float norm_eps, bool key_is_final, Tensor? sinks_Hq, float scale, int window, "
      "float softcap) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lragent, CPU, m) { m.impl("flash_lora_attention_cpp", &lragent::flash_lora_attention); }
