"""What holds for every test."""

import torch

# Tests run side by side; kernels whose threads wait for each other's cores take up to ten times as long.
torch.set_num_threads(1)
