// Registers the C++ kernels; the ops' schemas are defined in `lragent.kernels.ops`.
#include <torch/library.h>

#include "attention.h"

TORCH_LIBRARY_IMPL(lragent, CPU, m) { m.impl("flash_lora_attention_cpp", &lragent::flash_lora_attention); }
