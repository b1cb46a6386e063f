"""A bank of kernels with a known answer: legal ones, never to be blamed, and wrong ones."""
