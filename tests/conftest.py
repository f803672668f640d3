"""What all tests share."""

import torch

torch.set_num_threads(1)  # the tests' tensors are tiny: on a busy machine, waiting for a second thread takes far longer
