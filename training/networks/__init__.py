"""Networks as they are trained: LoRA adapters, text encoders and new words."""
