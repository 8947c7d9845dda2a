from lragent.kernels.flash_lora_attention.reference import flash_lora_attention  # noqa
