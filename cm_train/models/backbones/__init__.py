"""Networks: F(x, c_noise, labels, dropout_keys) -> [B, C, H, W], without preconditioning."""
