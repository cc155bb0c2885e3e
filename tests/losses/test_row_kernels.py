"""The row kernels themselves: what only a launch can show."""

import ast
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from llmfast_kernels import cross_entropy as rows
from llmfast_kernels import distillation as pairs
from llmfast_kernels import launch
from llmfast_kernels import scale as scaling
from llmfast_kernels.distillation import distillation, distillation_backward
from llmfast_kernels.launch import Tile
from llmfast_kernels.scale import scale
from llmfast_kernels.teaching import Divergence, TeacherRows
from llmfast_kernels.terms import Rows, Targets, Terms, Upstream
from support.launched import unrecorded
from support.numerics import assert_no_worse

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def one_each(targets: Tensor) -> Targets:
    return Targets(targets[:, None].contiguous())


def forward(logits: Tensor, targets: Tensor, V: int, **more: Any) -> Rows:
    return rows.cross_entropy(logits, one_each(targets), Terms(V), V=V, **more)


def backward(logits: Tensor, targets: Tensor, made: Rows, d_loss: Tensor, V: int, **more: Any) -> None:
    rows.cross_entropy_backward(logits, one_each(targets), Terms(V), made.softmax, Upstream(d_loss), V=V, **more)


def padded(N: int, V: int, width: int, dtype: torch.dtype) -> Tensor:
    """Create a slab like the linear loss's, (N, width), with NaN in the padding."""
    slab = torch.full((N, width), torch.nan, dtype=dtype)
    slab[:, :V] = torch.randn(N, V).to(dtype)
    return slab


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 63, 1024, 1025, 50257])
def test_padding_is_neither_read_into_results_nor_left_dirty(dtype: torch.dtype, V: int) -> None:
    row_width = V // 64 * 64 + 64  # past whole tiles too
    slab = padded(2, V, row_width + 64, dtype)
    targets = torch.tensor([V - 1, -100])
    logits = slab[:, :V]
    x = logits.double()
    given = slab[:, :row_width]
    made = forward(given, targets, V, d_logits=given)
    want = torch.log_softmax(x[:1], 1)
    torch.testing.assert_close(
        made.loss.double(), torch.stack([-want[0, V - 1], torch.zeros(()).double()]), rtol=0, atol=3e-6
    )
    torch.testing.assert_close((made.peak + made.total.log())[:1].double(), x[:1].logsumexp(1), rtol=1e-6, atol=1e-6)
    gradient = want.exp()
    gradient[0, V - 1] -= 1
    assert_no_worse(logits[:1], gradient.to(dtype), gradient, scale=1.0)
    assert slab[:, V:row_width].eq(0).all(), "padding within row_width is zeroed"
    assert slab[:, row_width:].isnan().all(), "columns beyond row_width are not touched"
    assert logits[1].eq(0).all()


@pytest.mark.parametrize("V", [1, 5, 1023, 1024, 1025, 40000])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_separate_backward_equals_the_fused_gradient(V: int, multiple: int) -> None:
    logits = padded(3, V, V // multiple * multiple + multiple, torch.float32)
    targets = torch.tensor([0, V - 1, -100])
    fused, apart = torch.empty_like(logits), torch.empty_like(logits)
    d_loss = torch.tensor([2.0, 2.0, torch.nan])
    made = forward(logits, targets, V, d_logits=fused, grad_scale=torch.tensor(2.0))
    backward(logits, targets, made, d_loss, V, d_logits=apart)
    torch.testing.assert_close(apart, fused, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", [-1, 70, 2**40])
def test_a_target_out_of_range_makes_its_row_nan_and_reads_nothing_else(target: int) -> None:
    logits = torch.randn(3, 70)
    targets = torch.tensor([1, target, 2])
    d_logits, apart = torch.empty_like(logits), torch.empty_like(logits)
    made = forward(logits, targets, 70, d_logits=d_logits)
    backward(logits, targets, made, torch.ones(3), 70, d_logits=apart)
    assert made.loss.isnan().tolist() == [False, True, False]
    partials = rows.cross_entropy_partials(logits, one_each(targets), Terms(70))
    assert partials.pull.isnan().tolist() == [False, True, False], "no rank may be silent about it"
    for gradient in (d_logits, apart):
        assert gradient.isnan().all(1).tolist() == [False, True, False]


def test_one_program_takes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, kernel = [], rows.cross_entropy_kernel

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(rows, "cross_entropy_kernel", Noted())
    for N in (1, 5):
        forward(torch.randn(N, 70), torch.zeros(N, dtype=torch.int64), 70)
    assert grids == [(1,), (5,)]


@pytest.mark.cpu("a failed assertion leaves a GPU unusable to the process")
def test_a_target_out_of_range_asserts_in_debug_mode() -> None:
    logits, out = torch.randn(1, 70), torch.empty(1)
    arguments = rows.arguments(logits, one_each(torch.tensor([70])), Terms(70), 70, None)
    made = {"rows": Rows(out, out, out, None, None), "partials": rows.NO_PARTIALS, "gradient": rows.NO_GRADIENT}
    with pytest.raises(Exception, match=r"target is neither in \[0, V\) nor ignore_index"):
        rows.cross_entropy_kernel[(1,)](**arguments, **made, grad_scale_ptr=None, **rows.tile(70), debug=True)


@pytest.mark.parametrize(
    ("dtype", "stride", "width", "vector", "tail"),
    [
        (torch.bfloat16, 50304, 50304, 8, True),  # the library's own slab
        (torch.float32, 50304, 50304, 4, True),
        (torch.bfloat16, 50304, 50257, 8, False),
        (torch.bfloat16, 50257, 50257, 1, True),  # a user's GPT-2 logits: rows start anywhere
        (torch.float32, 1000, 1000, 4, True),  # no multiple of 16, but of 4
    ],
)
def test_widest_access_that_rows_allow(dtype: torch.dtype, stride: int, width: int, vector: int, tail: bool) -> None:
    logits = torch.empty(2, stride, dtype=dtype)
    assert rows.vectors(width, logits, None) == {"VECTOR": vector, "VECTOR_TAIL": tail}
    assert rows.vectors(width, logits, logits[:, 1:])["VECTOR"] == 1


@pytest.mark.parametrize("V", [1, 2, 1000, 1024, 32000, 50257, 256000])
def test_tiles_are_powers_of_two_that_the_threads_divide(V: int) -> None:
    for meta in (rows.tile(V), rows.backward_tile(V)):
        assert triton.next_power_of_2(meta["BLOCK_V"]) == meta["BLOCK_V"]
        assert 1 <= meta["num_warps"] <= 32
    assert rows.tile(V)["THREADS"] == 32 * rows.tile(V)["num_warps"]


def chosen_tile(**options: Any) -> int:
    """Return the columns of the tile that a row of many classes takes."""
    V, targets = 1 << 15, Targets(torch.zeros(1, 1).long())
    results = {name: options.pop(name) for name in ("stats", "logprobs") if name in options}
    found: list[int] = []
    launcher = mock.MagicMock()
    launcher.__getitem__.return_value = lambda **given: found.append(given["BLOCK_V"])
    with mock.patch.object(rows, "cross_entropy_kernel", launcher):
        rows.cross_entropy(torch.zeros(1, V), targets, Terms(V, **options), **results)
    return found[0]


def test_what_takes_registers_has_smaller_tiles() -> None:
    """Take 16 elements per thread, 8 with terms that need registers, and half the threads with all results."""
    few: list[dict[str, Any]] = [{}, {"z_loss": 0.1}, {"logit_scale": 2.0}, {"stats": True}, {"logprobs": True}]
    assert [chosen_tile(**options) for options in few] == [16 * 1024] * 5
    ones = torch.ones(1 << 15)
    many = [{"softcap": 5.0}, {"bias": ones}, {"class_weights": ones}, {"label_smoothing": 0.1}]
    assert [chosen_tile(**options) for options in many] == [8 * 1024] * 4
    assert chosen_tile(stats=True, logprobs=True) == chosen_tile(stats=True, logprobs=True, softcap=5.0) == 8 * 512


def test_pairs_that_take_registers_have_smaller_tiles() -> None:
    V, ones, y = 1 << 15, torch.ones(1 << 15), Targets(torch.zeros(1, 1).long())

    def chosen(beta: float = 0.0, hard: float | None = None, own: Any = None, **terms: Any) -> int:
        found: list[int] = []
        launcher = mock.MagicMock()
        launcher.__getitem__.return_value = lambda **given: found.append(given["BLOCK_V"])
        teacher = TeacherRows(Terms(V, **terms), logits=torch.zeros(1, V))
        with mock.patch.object(pairs, "distillation_kernel", launcher):
            distillation(torch.zeros(1, V), y, Terms(V, **(own or {})), teacher, Divergence(beta, 1.0, 1.0, hard))
        return found[0]

    assert chosen() == chosen(1.0) == chosen(own={"logit_scale": 2.0}) == chosen(logit_scale=2.0) == 8 * 512
    assert chosen(0.5) == chosen(hard=0.1) == 8 * 128
    for terms in ({"softcap": 5.0}, {"bias": ones}):
        assert chosen(own=terms) == chosen(**terms) == 8 * 128
    assert chosen(class_weights=ones) == 8 * 128


@pytest.mark.parametrize("size", [32, 64])
def test_warps_hold_the_threads_of_a_program_on_every_target(size: int) -> None:
    """AMD's wavefronts have 64 threads."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(warp_size=size)))
    with mock.patch.multiple(launch, INTERPRETED=False, driver=driver):
        assert [launch.warps(threads) for threads in (1024, 64, 32, 1)] == [1024 // size, 64 // size, 1, 1]


def test_another_tile_is_used_inside_the_context_only() -> None:
    choice = launch.Choice(Tile(8, 256), Tile(16, 256), Tile(8, 128))
    assert choice.tiles == (Tile(8, 256), Tile(16, 256), Tile(8, 128))
    with choice.trying(Tile(16, 256)):
        with choice.trying(Tile(8, 128)):
            assert choice.chosen == Tile(8, 128)
        assert choice.chosen == Tile(16, 256)
    with suppress(KeyboardInterrupt), choice.trying(Tile(16, 256)):
        raise KeyboardInterrupt
    assert choice.chosen == Tile(8, 256)


def launches(tree: ast.AST) -> list[ast.Call]:
    """Return calls like `kernel[grid](...)`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return [call for call in calls if ast.unparse(call.func).split("[")[0].endswith("_kernel")]


KERNELS = Path(rows.__file__).parent
FILES = [path for path in sorted(KERNELS.rglob("*.py")) if launches(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_kernels_are_launched_on_the_gpu_of_their_tensors(path: Path) -> None:
    """Triton launches on the current GPU, which is another one where a process has several."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = [
        call
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and any("device_of(" in ast.unparse(item) for item in block.items)
        for call in launches(block)
    ]
    assert {call.lineno for call in launches(tree)} == {call.lineno for call in guarded}


def test_every_kernel_is_launched_somewhere() -> None:
    text = [path.read_text(encoding="utf-8") for path in KERNELS.rglob("*.py")]
    kernels = {name for t in text for name in re.findall(r"^def (\w+_kernel)\(", t, re.MULTILINE)}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    assert {ast.unparse(call.func).split("[")[0].split(".")[-1] for tree in trees for call in launches(tree)} == kernels


TERMS = {"FEW_TERMS": Terms(40000), "MANY_TERMS": Terms(40000, softcap=20.0, label_smoothing=0.1, z_loss=1e-3)}


@pytest.mark.parametrize(
    ("choice", "tile"), [(name, tile) for name in TERMS for tile in getattr(rows, name).tiles[1:]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_gives_the_same_loss(choice: str, tile: Tile, dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 40000).to(dtype), one_each(torch.tensor([39999, 7]))
    gradients = [torch.empty_like(logits) for _ in range(2)]
    want = rows.cross_entropy(logits, targets, TERMS[choice], stats=True, d_logits=gradients[0])
    with getattr(rows, choice).trying(tile):
        got = rows.cross_entropy(logits, targets, TERMS[choice], stats=True, d_logits=gradients[1])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-8)


@pytest.mark.parametrize("tile", rows.BACKWARD.tiles[1:], ids=str)
def test_every_tile_gives_the_same_gradient_later(tile: Tile) -> None:
    logits, targets = torch.randn(2, 5000).bfloat16(), torch.tensor([4999, 7])
    made = forward(logits, targets, 5000)
    want, got = torch.empty_like(logits), torch.empty_like(logits)
    backward(logits, targets, made, torch.ones(2), 5000, d_logits=want)
    with rows.BACKWARD.trying(tile):
        backward(logits, targets, made, torch.ones(2), 5000, d_logits=got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tile", scaling.TILE.tiles[1:], ids=str)
def test_every_tile_scales_alike(tile: Tile) -> None:
    x, factor = torch.randn(9000), torch.tensor(0.3)
    with scaling.TILE.trying(tile):
        assert torch.equal(scale(x, factor, out=torch.empty(9000)), x * 0.3)


@pytest.mark.parametrize("numel", [0, 1, 4096, 5000])
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float32])
def test_scale(numel: int, out: torch.dtype | None) -> None:
    x = torch.randn(numel)
    want = x * 0.3
    result = scale(x, torch.tensor(0.3), out=None if out is None else torch.empty(numel, dtype=out))
    torch.testing.assert_close(result, want.to(result.dtype))
    assert (result is x) == (out is None)


def test_scale_by_one_touches_nothing() -> None:
    x = torch.tensor([torch.nan, 1.0])
    x.requires_grad_(False)
    before = x.view(torch.int32).clone()
    scale(x, torch.tensor(1.0))
    assert torch.equal(x.view(torch.int32), before)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 4e-7), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
@pytest.mark.parametrize("cap", [0.5, 30.0, 1000.0])
def test_softcap_is_as_exact_as_it_says(dtype: torch.dtype, allowed: float, cap: float) -> None:
    """Compare the peak of two logits, one of them 0, with the other one capped, and the loss with the formula."""
    ratios = torch.cat([torch.linspace(1e-3, 9.5, 60), torch.tensor([20.0])])
    x = torch.stack([ratios * cap, torch.zeros_like(ratios)], 1).to(dtype)
    made = rows.cross_entropy(x, one_each(torch.zeros(len(x), dtype=torch.int64)), Terms(2, softcap=cap))
    want = cap * torch.tanh(x[:, 0].double() / cap)
    assert ((made.peak.double() - want) / want).abs().max() < allowed
    negative = rows.cross_entropy(-x, one_each(torch.zeros(len(x), dtype=torch.int64)), Terms(2, softcap=cap))
    torch.testing.assert_close(negative.loss.double(), want + torch.log1p(torch.exp(-want)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_does_not_hide_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.nan, 1.0]], dtype=dtype)
    made = rows.cross_entropy(x, one_each(torch.tensor([0])), Terms(2, softcap=30.0))
    assert made.loss.isnan().all()


@pytest.mark.parametrize(
    ("file", "function", "before", "after"),
    [
        ("cross_entropy", "cross_entropy_backward_kernel", "read_logits", "store_gradient"),
        ("distillation", "distillation_backward_kernel", "read_logits", "store_gradient"),
        ("row", "store_target_gradients", "gradient", "store"),
        ("pairs", "store_target_gradient", "gradient", "store"),
    ],
)
def test_threads_wait_before_they_overwrite_what_others_read(file: str, function: str, before: str, after: str) -> None:
    """Look for the barriers: the interpreter has no threads, and machine code is compiled after the tests."""
    tree = ast.parse(Path(rows.__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
    (kernel,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    lines: dict[str, list[int]] = {}
    for node in ast.walk(kernel):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            lines.setdefault(name, []).append(node.lineno)
    (barrier,) = lines["debug_barrier"]
    assert max(lines[before]) < barrier < min(lines[after])


@pytest.mark.parametrize("target", [-1, 70, 2**40])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hard", [None, 0.5])
@unrecorded()
def test_a_target_out_of_range_makes_its_row_of_a_pair_nan(beta: float, hard: float | None, target: int) -> None:
    logits, said = torch.randn(2, 3, 70)
    targets, terms = one_each(torch.tensor([5, target, -100])), Terms(70)
    given = targets, terms, TeacherRows(terms, logits=said), Divergence(beta, 1.0, 1.0, hard)
    d_logits, later = torch.empty_like(logits), torch.empty_like(logits)
    found = distillation(logits, *given, d_logits=d_logits)
    distillation_backward(logits, *given, found.softmax, Upstream(torch.ones(3)), d_logits=later)
    assert found.loss.isnan().tolist() == [False, True, False]
    for gradient in (d_logits, later):
        assert gradient.isnan().any(1).tolist() == [False, True, False]
