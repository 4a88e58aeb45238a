"""Five ternary digits to a byte, and the way from a file to planes of two bits."""

import pytest
import torch

from tryplicity import UserError, kernels
from tryplicity.kernels import TernaryMatrix, plain

SHAPES = [(1, 1), (3, 5), (5, 7), (130, 257), (700, 1000)]


def random_digits(*shape):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def test_the_first_of_five_is_the_lowest_digit():
    assert kernels.pack(torch.tensor([[-1, -1, -1, -1, -1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, -1, -1, 0]],
                                     dtype=torch.int8)).flatten().tolist() == [0, 242, 121, 2 + 3 + 81]


def test_every_byte_and_every_five():
    packed = torch.arange(243, dtype=torch.uint8)[:, None]
    digits = kernels.unpack(packed, 5)
    assert len(digits.unique(dim=0)) == 243
    assert torch.equal(kernels.pack(digits), packed)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 11)])
def test_there_and_back(shape):
    digits = random_digits(*shape)
    packed = kernels.pack(digits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] // 5))
    assert torch.equal(kernels.unpack(packed, shape[-1]), digits)
    assert torch.equal(kernels.pack(digits.float()), packed)
    rows = digits.view(-1, shape[-1])
    assert torch.equal(plain.pack(rows), packed.view(len(rows), -1))
    assert torch.equal(plain.unpack(packed.view(len(rows), -1), shape[-1]), rows)


@pytest.mark.parametrize("out, columns", SHAPES)
@pytest.mark.parametrize("experts", [None, 1, 3])
def test_planes_hold_the_digits(out, columns, experts):
    digits = random_digits(*([] if experts is None else [experts]), out, columns)
    scale = torch.rand(experts or 1, 1, 1) if experts else torch.tensor([[0.25]])
    packed = kernels.pack(digits)
    for matrix in (TernaryMatrix.from_digits(digits, scale), TernaryMatrix.from_packed(packed, scale, columns)):
        assert torch.equal(matrix.digits(), digits)
        assert matrix.experts == experts and torch.equal(matrix.scale_E, scale.flatten())
    # of what pads the matrix only the rows it has are the same for the twin
    for made in (plain.planes(digits.view(-1, out, columns)),
                 plain.planes_of_packed(packed.view(-1, out, packed.shape[-1]), columns)):
        twin = TernaryMatrix(made, matrix.scale_E, out, columns, experts)
        assert torch.equal(twin.digits(), digits)


def test_straight_from_a_mapped_file(tmp_path):
    """Read-only pages of a file are enough; nothing writes to them."""
    import numpy

    digits = random_digits(64, 333)
    path = tmp_path / "packed"
    path.write_bytes(kernels.pack(digits).numpy().tobytes())
    mapped = numpy.memmap(path, dtype=numpy.uint8, mode="r", shape=(64, 67))
    with pytest.warns(UserWarning, match="not writable"):
        packed = torch.from_numpy(mapped)
    assert torch.equal(TernaryMatrix.from_packed(packed, 0.1, 333).digits(), digits)


@pytest.mark.parametrize("library", ["compiled", "plain"])
def test_a_damaged_file_is_refused(library, monkeypatch):
    if library == "plain":
        monkeypatch.setattr(kernels.library, "library", lambda: None)
    packed = kernels.pack(random_digits(8, 40))
    packed[5, 3] = 243
    with pytest.raises(UserError, match="above 242"):
        TernaryMatrix.from_packed(packed, 0.1, 40)


def test_packed_for_another_shape_is_refused():
    with pytest.raises(UserError, match=r"46 columns pack into 10 bytes \(torch.uint8\), not 8"):
        TernaryMatrix.from_packed(kernels.pack(random_digits(8, 40)), 0.1, 46)
    with pytest.raises(UserError, match="2 scales for 1 matrices"):
        TernaryMatrix.from_packed(kernels.pack(random_digits(8, 40)), torch.ones(2), 40)
