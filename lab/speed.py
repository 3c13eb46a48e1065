"""What would be faster on this processor than what the run does: bf16, where it has instructions for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from crucible.configuration import Config
from crucible.files import write_atomically
from crucible.machine import device_kind, processor_name
from crucible.private import has_bf16_instructions
from datasets.images import cache_folder
from lab.config import SMALL_IMAGE

BF16 = ("trainer.precision=bf16-mixed", "model.channels_last=true")
WORTH_A_WORD = 1.2
_BATCH = 8
_ROUNDS = 5
_CHANNELS = (64, 128, 256, 512)


def faster_here(config: Config, settled: Sequence[str]) -> str:
    """The options that would train this run faster on this processor, in a line; empty where none are known.

    Precision and memory format stay what they are: a run's numbers then depend on its configuration, and not on the
    machine that it came to.

    Args:
        config: plain and resolved.
        settled: what `lab.config.resolve` says it settled.
    """
    data, trainer = config["data"], config["trainer"]
    chosen = "precision 32-true" not in settled or config["model"]["channels_last"] is not None
    if chosen or data["input_dim"] != 2 or device_kind(trainer["accelerator"]) != "cpu":
        return ""
    if not has_bf16_instructions():
        return ""
    size = data["input_size"]
    if size >= SMALL_IMAGE:
        size //= 4  # behind the stem
    factor = _remembered(size)
    if factor < WORTH_A_WORD:
        return ""
    what = f"a step of 3x3 convolutions on {size}x{size}"
    return f"{' '.join(BF16)}: {what} is {factor:.1f} times as fast on this processor"


def _remembered(size: int) -> float:
    """`bf16_factor`, measured once a machine."""
    facts = [processor_name(), torch.__version__, size, _BATCH, _CHANNELS]
    kept = cache_folder("speed") / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, ValueError):
        return float(kept.read_text(encoding="utf-8"))
    factor = bf16_factor(size)
    with contextlib.suppress(OSError):  # without a place to keep it, it is measured again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, f"{factor:.3f}\n")
    return factor


def bf16_factor(size: int) -> float:
    """How many times as fast as the defaults a training step in bf16 and channels_last is on this processor.

    Of a stand-in: four 3x3 convolutions of 64 to 512 channels with norms, each but the first at stride 2, on 8 images.
    By turns, the fastest of five each, on one core: several would wait for each other wherever others are at work.

    Args:
        size: of the images, in pixels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            steps = [_step(size, half) for half in (False, True)]
            for step in steps:
                step()
            took = [[_seconds(step) for step in steps] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    plain, half = (min(times) for times in zip(*took, strict=True))
    return plain / half


def _step(size: int, half: bool) -> Callable[[], None]:
    layers: list[nn.Module] = []
    channels = _CHANNELS[0]
    for width in _CHANNELS:
        stride = 2 if layers else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    network, images = nn.Sequential(*layers), torch.randn(_BATCH, _CHANNELS[0], size, size)
    if half:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = network(images)
        out.float().square().mean().backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()  # which other programs disturb less than the clock
    step()
    return time.process_time() - start
