"""What is said of a device, and how often a training step makes a GPU wait (counted without one)."""

import logging
from typing import Any

import pytest
import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_matryoshka.devices import warn_of_slow_bfloat16
from sae_lens_matryoshka.saes import thresholded_family

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "repeat_interleave")
"""Operations whose result's size or value the CPU must know before it goes on."""


@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_slow_bfloat16_is_said_where_it_is_slow(
    capability: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        warn_of_slow_bfloat16(device, dtype, "--dtype float32")
    slow = capability == "AVX2" and dtype == torch.bfloat16 and device == "cpu"
    assert ("--dtype float32 is faster here" in caplog.text) == slow


class _Waits(TorchDispatchMode):
    """Counts the operations that make the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("architecture", "most"),
    [("matryoshka", 4), ("matryoshka_topk", 9), ("matryoshka_jumprelu", 4), ("matryoshka_standard", 4)],
)
@pytest.mark.parametrize("options", [{}, {"stop_gradient_between_levels": "inner", "loss_tilt": 0.1}], ids=str)
def test_a_step_waits_for_the_gpu_no_more_often_than_is_known(
    architecture: str, most: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(thresholded_family, "LISTED_SHARE", 1.0)
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    k = {"k": 4} if "jumprelu" not in architecture and "standard" not in architecture else {}
    sae = sae_class(config_class(d_in=16, d_sae=64, matryoshka_widths=[8, 24, 64], **k, **options))  # type: ignore[call-arg]
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    alive = torch.zeros(64, dtype=torch.bool)
    waits = _Waits()
    for step in range(3):
        waits.found.clear()
        with waits:
            output = sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0, "l0": 1.0}, alive, step, False))
            output.loss.backward()
    assert 0 < len(waits.found) <= most, waits.found
