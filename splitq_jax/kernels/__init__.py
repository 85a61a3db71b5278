"""Low-bit kernels: one public function a job (`splitq_jax.kernels.api`), a reference in XLA, and a source for each accelerator."""
