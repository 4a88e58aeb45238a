"""Operations on tensors without data give what torch gives on tensors with data: sizes, dtypes, strides, memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from tryplicity.planner.measure import Tracker
from tryplicity.planner.measure import without_data as module_without_data
from tryplicity.planner.shapes import Shape

B, T, D = 2, 6, 8


def inputs():
    """x and y [B, T, D], z complex, w [D, D], row [D], i whole numbers, m a mask, t a transposed x."""
    torch.manual_seed(0)
    x, y = torch.randn(B, T, D), torch.randn(B, T, D)
    z = torch.randn(B, T, D, dtype=torch.complex64)
    t = torch.randn(B, D, T).transpose(1, 2)
    return {"x": x, "y": y, "z": z, "w": torch.randn(D, D), "row": torch.randn(D), "t": t,
            "i": torch.randint(0, T, (B, T)), "m": torch.rand(B, T, D) > 0.5, "image": torch.randn(B, 4, 10, 10)}


def in_place(x, *names_and_arguments):
    """A copy of x, changed in place by methods."""
    x = x * 1
    for name, *arguments in names_and_arguments:
        getattr(x, name)(*arguments)
    return x


OPERATIONS = {
    # complex numbers
    "rfft": lambda x, **_: torch.fft.rfft(x, n=2 * T, dim=1),
    "irfft of rfft": lambda x, **_: torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1), n=2 * T, dim=1),
    "fft": lambda x, **_: torch.fft.fft(x, dim=1),
    "fft of two dimensions": lambda z, **_: torch.fft.fft2(z),
    "ifft": lambda z, **_: torch.fft.ifft(z, dim=1).real,
    "fft convolution": lambda x, row, **_: torch.fft.irfft(torch.fft.rfft(x, n=16, dim=1)
                                                           * torch.fft.rfft(row, n=16)[:9, None], n=16, dim=1)[:, :T],
    "complex of two": lambda x, y, **_: torch.complex(x, y),
    "polar": lambda x, y, **_: torch.polar(x.abs(), y),
    "complex product": lambda z, **_: z * z.conj(),
    "complex times real": lambda x, z, **_: x * z,
    "complex exponential": lambda z, **_: z.exp(),
    "absolute value": lambda z, **_: z.abs(),
    "angle": lambda z, **_: z.angle(),
    "real and imaginary part": lambda z, **_: (z.real * 2, z.imag),
    "view_as_real": lambda z, **_: torch.view_as_real(z),
    "view_as_complex": lambda x, **_: torch.view_as_complex(x.view(B, T, D // 2, 2)),
    "conj, twice": lambda z, **_: z.conj().conj(),
    "conj made physical": lambda z, **_: z.conj().resolve_conj(),
    "imaginary part of a conj, a negative view": lambda z, **_: z.conj().imag,
    "complex sum": lambda z, **_: z.sum(),
    "complex mean over a dimension": lambda z, **_: z.mean(1),
    "complex cumsum": lambda z, **_: z.cumsum(1),
    "complex cumprod": lambda z, **_: z.cumprod(1),
    "complex norm": lambda z, **_: torch.linalg.vector_norm(z, dim=-1),
    "complex matrix product": lambda z, w, **_: z @ w.to(torch.complex64),
    "complex einsum": lambda z, **_: torch.einsum("btd,bsd->bts", z, z.conj()),
    "complex where": lambda z, m, **_: torch.where(m, z, 0),
    "to complex": lambda x, **_: x.to(torch.complex64),
    # in place, changing the shape
    "transpose_": lambda x, **_: in_place(x, ("transpose_", 0, 1)),
    "t_": lambda w, **_: in_place(w, ("t_",)),
    "swapaxes_": lambda x, **_: in_place(x, ("swapaxes_", 1, 2)),
    "swapdims_": lambda x, **_: in_place(x, ("swapdims_", 1, 2)),
    "squeeze_ and unsqueeze_": lambda x, **_: in_place(x, ("unsqueeze_", 1), ("squeeze_", 1), ("unsqueeze_", -1)),
    "as_strided_": lambda x, **_: in_place(x, ("as_strided_", (3, 4), (4, 1), 5)),
    "transpose_ and then a product in place": lambda x, **_: in_place(x, ("transpose_", 1, 2), ("mul_", 2)),
    # reductions, sorts, searches
    "sum": lambda x, **_: x.sum((0, -1), keepdim=True),
    "sum of booleans": lambda m, **_: m.sum(1),
    "mean": lambda t, **_: t.mean(1),
    "var": lambda x, **_: x.var(-1),
    "std_mean": lambda x, **_: torch.std_mean(x, 1),
    "amax": lambda x, **_: x.amax(1),
    "max with indices": lambda x, **_: x.max(1),
    "argmax": lambda x, **_: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True)),
    "logsumexp": lambda x, **_: x.logsumexp(-1),
    "cumsum": lambda t, **_: t.cumsum(1),
    "cummax": lambda x, **_: x.cummax(1),
    "logcumsumexp": lambda x, **_: x.logcumsumexp(1),
    "topk": lambda x, **_: x.topk(3, -1),
    "sort": lambda t, **_: t.sort(1),
    "kthvalue": lambda x, **_: x.kthvalue(2, 1),
    "median": lambda x, **_: x.median(-1),
    "any and all": lambda m, **_: (m.any(-1), m.all()),
    "bucketize": lambda x, row, **_: torch.bucketize(x, row.sort().values),
    # indexing
    "gather": lambda x, i, **_: x.gather(1, i[..., None].expand(-1, -1, D)),
    "index at adjacent places": lambda x, i, **_: x[:, i],
    "index at places apart": lambda x, i, **_: x[i % B, :, i],
    "index_put": lambda x, i, **_: x.index_put((i % B, i), torch.ones(())),
    "take_along_dim": lambda x, i, **_: torch.take_along_dim(x, i[..., None], 1),
    "scatter_add": lambda x, i, **_: x.scatter_add(1, i[..., None].expand(-1, -1, D), x),
    "scatter_reduce": lambda x, i, **_: x.scatter_reduce(1, i[..., None].expand(-1, -1, D), x, "amax"),
    "index_add": lambda x, i, **_: x.index_add(1, i[0], x),
    "masked_fill": lambda t, m, **_: t.masked_fill(m, 0),
    "masked_scatter": lambda x, m, **_: x.masked_scatter(m, x),
    "roll": lambda x, **_: x.roll(1, 1),
    "flip": lambda x, **_: x.flip(1),
    "unfold": lambda x, **_: x.unfold(1, 3, 1),
    "repeat_interleave": lambda x, **_: x.repeat_interleave(2, 1),
    "tril, diagonal, trace": lambda w, **_: (w.tril(), w.diagonal(), w.trace()),
    # pointwise, with strides to be found
    "contiguous and transposed": lambda x, t, **_: (x + t, t + x, t * 2, torch.where(t > 0, t, x)),
    "outer sum": lambda row, **_: row[:, None] + row,
    "half and full": lambda x, row, **_: x.bfloat16() * row,
    "whole numbers and floats": lambda i, **_: (i / 2, i // 2, i * 1.5, i > 2, i.float()),
    "permuted": lambda x, **_: (x.permute(2, 0, 1) * 2, F.silu(x.permute(2, 0, 1)), x.permute(1, 2, 0).clone()),
    "copies of an expanded one": lambda row, **_: (row.expand(4, D).clone(), row.expand(4, D) * 1),
    "every other": lambda x, **_: (x[:, ::2] * 2, x[:, ::2].clone(), x[:, ::2].contiguous()),
    "lerp, addcmul, clamp": lambda x, y, **_: (x.lerp(y, 0.5), torch.addcmul(x, x, y), x.clamp(min=y)),
    # layers
    "convolution": lambda x, **_: F.conv1d(x, torch.ones(4, T, 3), padding=2),
    "depthwise convolution": lambda x, **_: F.conv1d(x, torch.ones(T, 1, 3), groups=T, padding=2),
    "convolution of images": lambda image, **_: F.conv2d(image, torch.ones(6, 4, 3, 3)),
    "pooling": lambda image, x, **_: (F.max_pool2d(image, 2), F.avg_pool1d(x, 2), F.adaptive_avg_pool2d(image, 1)),
    "padding": lambda x, **_: (F.pad(x, (1, 2)), F.pad(x, (1, 2), mode="reflect"), F.pad(x, (-1, 0, 0, 1))),
    "layer norm": lambda x, row, **_: F.layer_norm(x, (D,), row, row),
    "group norm": lambda x, **_: F.group_norm(x, 3),
    "batch norm": lambda x, **_: F.batch_norm(x, torch.zeros(T), torch.ones(T), training=True),
    "rms norm": lambda x, row, **_: F.rms_norm(x, (D,), row),
    "dropout": lambda x, **_: F.dropout(x, 0.5),
    "rrelu": lambda x, **_: F.rrelu(x, training=True),
    "glu, prelu, gelu, softplus": lambda x, **_: (F.glu(x), F.prelu(x, torch.ones(T)), F.gelu(x), F.softplus(x)),
    "bilinear": lambda x, y, w, **_: F.bilinear(x, y, w[None].expand(3, D, D)),
    "attention": lambda x, **_: F.scaled_dot_product_attention(
        *[x.view(B, T, 2, D // 2).transpose(1, 2)] * 3, is_causal=True),
    "embedding": lambda i, w, **_: F.embedding(i, w),
    "cross entropy": lambda x, i, **_: F.cross_entropy(x.flatten(0, 1), i.flatten()),
    "kl_div and mse": lambda x, y, **_: (F.kl_div(x, y, reduction="sum"), F.mse_loss(x, y),
                                          F.binary_cross_entropy_with_logits(x, x)),
    "cdist": lambda x, y, **_: torch.cdist(x, y),
    # algebra
    "einsum": lambda x, w, **_: torch.einsum("btd,de->bte", x, w),
    "baddbmm, addmm": lambda x, w, **_: (torch.baddbmm(x @ w, x, w.expand(B, D, D)), torch.addmm(w, w, w)),
    "mv, dot, outer": lambda w, row, **_: (w @ row, row @ row, torch.outer(row, row)),
    "solve": lambda w, row, **_: torch.linalg.solve(w + 9 * torch.eye(D), row),
    "cholesky, qr, svd": lambda w, **_: (torch.linalg.cholesky(w @ w.T + torch.eye(D)), *torch.linalg.qr(w),
                                         *torch.linalg.svd(w)),
    "matrix_exp, inverse": lambda w, **_: (torch.matrix_exp(w), torch.linalg.inv(w)),
    "kron": lambda w, **_: torch.kron(w, w),
    # many tensors
    "cat, stack, split": lambda x, t, **_: (torch.cat([x, t], 1), torch.stack([x, t]), x.split(2, 1), x.unbind(1)),
    "cat of dtypes": lambda x, i, **_: torch.cat([x[..., 0], i], -1),
    "chunks without a promise": lambda x, **_: torch.unsafe_chunk(x * 2, 2, -1),
    "foreach": lambda x, y, **_: (torch._foreach_add([x, y], 1.0), torch._foreach_mul([x], [y])),
    "an output given": lambda x, y, **_: torch.add(x.detach(), y.detach(), out=torch.empty(0)),
    "outputs given": lambda x, **_: torch.sort(x.detach(), out=(torch.empty(0), torch.empty(0, dtype=torch.int64))),
    "factories": lambda x, **_: (torch.arange(5), torch.arange(1, 2, 0.25), torch.linspace(0, 1, 5), torch.eye(3),
                                 torch.full((2,), 1.0), x.new_zeros(3), torch.zeros_like(x, dtype=torch.int32),
                                 torch.rand(2, 3), torch.randint(0, 5, (2,)), torch.tril_indices(3, 3)),
    "casts": lambda x, **_: (x.to(torch.bfloat16), x.half(), x.double(), x.type(torch.int8), x.bool()),
    "views of other dtypes": lambda x, **_: (x.view(torch.int32), x.bfloat16().view(torch.int16)),
    "meshgrid, movedim, unflatten": lambda x, row, **_: (torch.meshgrid(row, row, indexing="ij"), x.movedim(0, -1),
                                                         x.unflatten(-1, (2, 4)), x.reshape(B * T, D)),
}
LAYERS = {
    "gru": lambda: nn.GRU(D, 5), "gru, batch first": lambda: nn.GRU(D, 5, batch_first=True),
    "gru, two ways": lambda: nn.GRU(D, 5, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(D, 5), "rnn, batch first": lambda: nn.RNN(D, 5, batch_first=True),
    "lstm": lambda: nn.LSTM(D, 5), "lstm, batch first": lambda: nn.LSTM(D, 5, batch_first=True),
    "lstm, two ways": lambda: nn.LSTM(D, 5, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(D, 5, proj_size=3),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True),
}


#: whose strides torch's own FakeTensorMode has otherwise than torch, before 2.12
OTHER_STRIDES = ("rfft", "fft") if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12) else ()


def told(value, strides=True):
    """What of a result a plan depends on."""
    return [(tuple(t.shape), t.dtype, strides and t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())
            for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def forward_and_backward(run, leaves):
    out = run(leaves)
    sources = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted = [t for t in leaves.values() if t.requires_grad]
    grads = torch.autograd.grad(sources, wanted, [torch.ones_like(t) for t in sources], allow_unused=True)
    return out, grads


def without_data(value):
    if not isinstance(value, torch.Tensor):
        return value
    return Shape(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"))


def leaves_of(tensors):
    return {k: t.requires_grad_(t.is_floating_point() or t.is_complex()) for k, t in tensors.items()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_same_without_data(name):
    """Forward and backward pass; and nothing that was made stays."""
    def run(tensors):
        return told(forward_and_backward(lambda t: OPERATIONS[name](**t), leaves_of(tensors)),
                    name not in OTHER_STRIDES)

    shapes = tree_map(without_data, inputs())
    real = run(inputs())
    with Tracker() as tracker:
        found = run(shapes)
        assert tracker.live == 0
    assert found == real


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_gives_the_same_without_data(name, rows):
    layer, x = LAYERS[name](), torch.randn(rows, T, D)
    shapes = module_without_data(layer), without_data(x)

    def run(module, x):
        leaves = {"x": x.requires_grad_(), **dict(module.named_parameters())}
        return told(forward_and_backward(lambda _: module(x), leaves))

    real = run(layer, x)
    with Tracker() as tracker:
        found = run(*shapes)
        assert tracker.live == 0
    assert found == real


def test_memory_in_place_grows_with_the_tensor():
    with Tracker() as tracker:
        x = torch.empty(2, 256)
        assert tracker.live == 4 * 512
        x.resize_(1024)
        assert (x.shape, tracker.live) == ((1024,), 4 * 1024)
        y = torch.empty(256).set_(x)
        assert (y.shape, tracker.live) == ((1024,), 4 * 1024), "of one memory"
        del x
        assert tracker.live == 4 * 1024
        y.resize_(2048)
        del y
    assert (tracker.live, tracker.peak) == (0, 4 * 2048)


def test_chunks_lie_in_one_memory():
    with Tracker() as tracker:
        parts = list(torch.unsafe_chunk(torch.zeros(8, 512), 4, -1))
        assert tracker.live == 4 * 8 * 512
        del parts[1:]
        assert tracker.live == 4 * 8 * 512
        del parts
    assert tracker.live == 0


def test_the_project_s_own_layers_need_no_slow_import():
    """What `build` of an installed spec runs has rules; the algebra behind torch's own takes two seconds to import."""
    program = ("import sys; from tryplicity import load_plugins; from tryplicity.builder import build; "
               "[build(spec, profile, load_plugins().registry) for spec, profile in "
               "(('tiny', 'cpu'), ('5090', '5090'), ('full', 'h200'))]; print('sympy' in sys.modules)")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout == "False\n"
