"""A denoiser, in memory and on disk."""
