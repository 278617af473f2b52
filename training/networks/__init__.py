"""What is trained around or inside a network: LoRA adapters, text encoders and new words."""
