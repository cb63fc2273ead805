"""Faults of Megatron-Core that are mended in every process."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from world_support import parallel, run_world


def test_a_sum_over_ranks_of_a_tensor_that_is_not_contiguous_arrives() -> None:
    def work() -> tuple[torch.Tensor, torch.Tensor]:
        parallel.start(parallel.Parallel(tensor=2), seed=1)
        group = parallel_state.get_tensor_model_parallel_group()
        x = torch.ones(2, 3, requires_grad=True)
        copied = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        copied.T.contiguous().view(-1)[::2].sum().backward()  # the gradient is a transposed tensor
        return mappings._reduce(torch.arange(6.0).view(2, 3).T, group), x.grad

    for summed, gradient in run_world(2, work):
        assert torch.equal(summed, 2 * torch.arange(6.0).view(2, 3).T)
        assert gradient.tolist() == [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]


def test_pieces_of_unlike_sizes_are_gathered_and_summed_over_gloo() -> None:
    def work() -> tuple[torch.Tensor, torch.Tensor]:
        parallel.start(parallel.Parallel(tensor=2), seed=1)
        group = parallel_state.get_tensor_model_parallel_group()
        sizes = [3, 1]
        mine = torch.full((sizes[group.rank()], 2), float(group.rank() + 1), requires_grad=True)
        whole = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=sizes)
        (whole * torch.arange(4.0)[:, None]).sum().backward()
        return whole.detach(), mine.grad

    (first, first_gradient), (second, second_gradient) = run_world(2, work)
    assert first[:, 0].tolist() == second[:, 0].tolist() == [1.0, 1.0, 1.0, 2.0]
    assert first_gradient[:, 0].tolist() == [0.0, 2.0, 4.0]
    assert second_gradient[:, 0].tolist() == [6.0]
