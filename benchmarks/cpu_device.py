"""What one CPU core reaches: the measured numbers of device `cpu` in compiler/data/accelerators.yaml.

    OMP_NUM_THREADS=1 python benchmarks/cpu_device.py

Times square matrix products (2 n^3 FLOPs) on one thread, in fp32 and bf16, with torch (the library that training uses), and a
copy of 256 MB. Prints the best of several repetitions: other processes only ever make a repetition slower. Timed by process
time, so that a busy machine counts the core and not its queue.
"""

import time

import torch


def matmul_flops_per_s(size: int, dtype: torch.dtype, repetitions: int) -> float:
    """Best rate of a size x size x size product, in FLOP/s."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    left @ right
    best = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        left @ right
        best = min(best, time.process_time() - start)
    return 2.0 * size**3 / best


def copy_bytes_per_s(megabytes: int, repetitions: int) -> float:
    """Best rate of a copy in memory, bytes read plus bytes written a second."""
    source = torch.ones(megabytes * 250_000)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        target.copy_(source)
        best = min(best, time.process_time() - start)
    return 2e6 * megabytes / best


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in (128, 384, 1024, 2048):
            print(f"{name} {size:5d}^3: {matmul_flops_per_s(size, dtype, 8 if size < 2048 else 3) / 1e9:8.1f} GFLOP/s")
    print(f"copy of 256 MB: {copy_bytes_per_s(256, 8) / 1e9:.1f} GB/s (read plus written)")


if __name__ == "__main__":
    main()
