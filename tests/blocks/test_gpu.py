"""Every variant of every mixer on a CUDA device equals the CPU: outputs and gradients."""

import pytest
import torch

from seqzoo.blocks.registry import create_mixer, list_mixers, mixer_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = [(name, variant) for name in list_mixers() for variant in mixer_info(name).cls.variants]


def outputs(mixer, x, context):
    x = x.clone().requires_grad_()
    y = mixer(x, context).y
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return [y, x.grad, *[p.grad for p in mixer.parameters() if p.grad is not None]]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_cuda_equals_cpu(name, variant):
    torch.manual_seed(0)
    mixer = create_mixer(name, 16, **mixer_info(name).cls.variants[variant]).eval()
    x, context = torch.randn(2, 37, 16), torch.randn(2, 11, 16) if mixer.cross else None
    expected = outputs(mixer, x, context)
    mixer.zero_grad()
    found = outputs(mixer.cuda(), x.cuda(), None if context is None else context.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
