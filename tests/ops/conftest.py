"""What the tests of the CPU kernels run on."""

from __future__ import annotations

import pytest
import torch

from countdown.ops.cpu import library

VARIANTS = [] if library.missing() else library.library().variants


@pytest.fixture(params=VARIANTS)
def variant(request):
    library.library().take_variant(request.param)
    yield request.param
    library.library().take_variant(VARIANTS[0])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
