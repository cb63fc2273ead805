"""What one CPU core reaches: the measured numbers of device `cpu` in compiler/data/accelerators.yaml.

    OMP_NUM_THREADS=1 python benchmarks/cpu_device.py

Times square matrix products (2 n^3 FLOPs) on one thread, in fp32 and bf16, with torch (the library that training uses), a copy
of 256 MB, and gloo's all-reduce between two processes. Prints the best of several repetitions: other processes only ever make
a repetition slower. Products and the copy are timed by process time, so that a busy machine counts the core and not its queue.
"""

import multiprocessing
import tempfile
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


def all_reduce_bytes_per_s(rank: int, rendezvous: str, megabytes: int, repetitions: int) -> None:
    """Prints the best rate of an all-reduce between two processes: bytes that each sends (as many as the buffer has) a second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    buffer = torch.ones(megabytes * 250_000)
    torch.distributed.all_reduce(buffer)
    best = float("inf")
    for _ in range(repetitions):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        best = min(best, time.perf_counter() - start)
    if rank == 0:
        print(f"all-reduce of {megabytes} MB, 2 processes: {1e6 * megabytes / best / 1e9:.2f} GB/s sent by each")
    torch.distributed.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in (128, 384, 1024, 2048):
            print(f"{name} {size:5d}^3: {matmul_flops_per_s(size, dtype, 8 if size < 2048 else 3) / 1e9:8.1f} GFLOP/s")
    print(f"copy of 256 MB: {copy_bytes_per_s(256, 8) / 1e9:.1f} GB/s (read plus written)")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/rendezvous", 16, 10)
        processes = [context.Process(target=all_reduce_bytes_per_s, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
