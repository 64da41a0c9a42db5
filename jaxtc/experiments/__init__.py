"""Many runs at once: sweeps, patching, gradients, and what to measure of them."""
