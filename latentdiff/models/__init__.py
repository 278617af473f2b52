"""Networks: plain PyTorch for one device, named as diffusers and transformers name them."""
