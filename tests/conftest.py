"""Without a GPU the kernels run in Triton's interpreter, chosen before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# the workers share the cores; one thread each is faster than two that wait for each other
torch.set_num_threads(1)
