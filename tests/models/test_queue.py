"""The queue of keys: its order, its ends, and what a resumed run finds in it."""

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medspark.models.queue import Queue


def rows(*numbers: int) -> Tensor:
    """Row n points at angle n / 10, with a length that must not matter."""
    angles = torch.tensor(numbers) / 10
    return (
        torch.stack([angles.cos(), angles.sin()], dim=1)
        * torch.arange(1, len(numbers) + 1)[:, None]
    )


def numbers(vectors: Tensor) -> list[int]:
    return (torch.atan2(vectors[:, 1], vectors[:, 0]) * 10).round().int().tolist()


def filled(size: int, *batches: list[int], device: str | torch.device = "cpu") -> Queue:
    queue = Queue(size, 2).to(device)
    for batch in batches:
        queue.enqueue(rows(*batch).to(device))
    return queue


def test_starts_empty_and_uses_only_what_was_put_in():
    queue = Queue(5, 2)
    assert queue.negatives().shape == (0, 2)
    queue.enqueue(rows(3, 1))
    assert numbers(queue.negatives()) == [3, 1]
    assert torch.allclose(queue.negatives().norm(dim=1), torch.ones(2))
    assert (queue.pointer, queue.filled) == (2, 2)


def test_the_oldest_make_room_and_a_batch_wraps_around():
    queue = filled(5, [0, 1, 2], [3, 4, 5])
    assert numbers(queue.vectors) == [5, 1, 2, 3, 4]
    assert (queue.pointer, queue.filled) == (1, 5)
    queue.enqueue(rows(6))
    assert numbers(queue.vectors) == [5, 6, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 4, 5, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 11, 16])
def test_any_batch_leaves_the_latest_in_order(size, batch, device):
    stream = list(range(31))
    queue = filled(size, *[stream[i : i + batch] for i in range(0, 31, batch)], device=device)
    start = int(queue.pointer)  # the oldest, once full
    held = numbers(queue.vectors.cpu())
    assert held[start:] + held[:start] == stream[-size:]
    assert (queue.pointer, queue.filled) == (31 % size, size)


def test_a_batch_is_as_good_as_its_rows_one_by_one():
    at_once, single = filled(4, [7, 8, 9, 10, 11, 12]), Queue(4, 2)
    for row in rows(7, 8, 9, 10, 11, 12):
        single.enqueue(row[None])
    assert torch.allclose(at_once.vectors, single.vectors, atol=1e-7)
    assert at_once.pointer == single.pointer


def test_a_resumed_run_goes_on_with_the_same_bits():
    queue = filled(5, [0, 1, 2])
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed = Queue(5, 2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for other in (queue, resumed, copy.deepcopy(queue)):
        assert set(other.state_dict()) == {"vectors", "pointer", "filled"}
    for batch in ([3, 4, 5], [6]):
        queue.enqueue(rows(*batch))
        resumed.enqueue(rows(*batch))
        assert all(map(torch.equal, queue.state_dict().values(), resumed.state_dict().values()))


def test_no_gradient_enters_and_later_rows_leave_a_loss_alone():
    queue = filled(3, [0, 1])
    weight = torch.ones(2, requires_grad=True)
    negatives = queue.negatives()
    loss = (weight * negatives).sum()
    queue.enqueue(rows(2, 3) * weight)
    assert not queue.vectors.requires_grad and not list(queue.parameters())
    loss.backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, F.normalize(rows(0, 1)).sum(0))


def test_rows_of_16_bits_and_other_devices(device):
    queue = Queue(3, 2).to(device)
    queue.enqueue(rows(1, 2).to(device).bfloat16())
    queue.enqueue(rows(3, 4).to(device))
    assert queue.vectors.dtype == torch.float32
    assert numbers(queue.negatives().cpu()) == [4, 2, 3]


def test_one_process_has_the_whole_share():
    queue = filled(3, [0, 1])
    assert torch.equal(queue.share(), queue.negatives())


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        Queue(0, 2)
    for wrong in (torch.zeros(2, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"\[5, 2\] takes rows \[B, 2\], not \(2,"):
            Queue(5, 2).enqueue(wrong)
