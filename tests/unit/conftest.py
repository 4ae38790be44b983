"""Tests of the engine: tiny tensors, for which more threads only wait for each other."""

import torch

torch.set_num_threads(1)
