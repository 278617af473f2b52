"""Networks: plain PyTorch modules for one device, with the weight names of diffusers and transformers."""
