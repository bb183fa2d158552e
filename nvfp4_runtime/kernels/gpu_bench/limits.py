"""What this GPU can do: bytes copied and read per second, BF16 operations per second, the gap between launches."""

from __future__ import annotations

import torch

from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.gpu_bench.timing import seconds_per_call

_BYTES = 1 << 30
_GEMM = 8192
_LAUNCHES = 500


def measure(setting: Setting) -> None:
    """Rows copy_bandwidth and read_bandwidth (bytes/s), bf16_rate (operations/s), launch_gap (seconds)."""
    device = setting.place
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        setting.emit(
            {
                "part": "limits",
                "name": "device",
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                "memory_bytes": properties.total_memory,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            }
        )
    num_bytes = 1 << 12 if setting.tiny else _BYTES
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = seconds_per_call([lambda: target.copy_(source)] * 4, setting)
    _say(setting, "copy_bandwidth", 2 * num_bytes / copy)
    # torch's sum keeps up with memory; what it reads is not written anywhere
    read = seconds_per_call([lambda: source.sum()] * 4, setting)
    _say(setting, "read_bandwidth", num_bytes / read)
    size = 64 if setting.tiny else _GEMM
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    gemm = seconds_per_call([lambda: torch.mm(a, b.t())] * 4, setting)
    _say(setting, "bf16_rate", 2 * size**3 / gemm)
    one = torch.zeros(1, device=device)
    _say(setting, "launch_gap", seconds_per_call([lambda: one.add_(1)] * (2 if setting.tiny else _LAUNCHES), setting))


def _say(setting: Setting, name: str, value: float) -> None:
    setting.emit({"part": "limits", "name": name, "value": value})
