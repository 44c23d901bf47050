"""Parameters stored in int8: codes and scales equal a plain rewrite, and every use of them that of their values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

from peft_pretraining.model.int8 import Int8Tensor, quantise_parameters
from sparse_lora import SparseLowRankLinear

BLOCK = 128
SHAPES = [(300, 64), (7, 128), (3, 500), (1000,), (128,), (5,), (1,)]


def stored(values: torch.Tensor, dtype: torch.dtype = torch.float32) -> Int8Tensor:
    made = Int8Tensor.like(values.to(dtype))
    made.copy_(values)
    return made


def rewritten(values: torch.Tensor) -> tuple[list[int], list[float]]:
    """Codes and scales of float values, block by block, in Python's float64."""
    flat, codes, scales = values.flatten().tolist(), [], []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = max(map(abs, block)) / 127
        scales.append(scale)
        codes += [round(value / scale) if scale else 0 for value in block]
    return codes, scales


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_rounded_to_the_nearest_code_of_their_block(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values.view(-1)[:128] *= 1e-3
    made = stored(values)
    codes, scales = rewritten(values)
    assert made.scales.tolist() == pytest.approx(scales, rel=1e-6)
    assert made.codes.dtype == torch.int8
    assert made.codes.shape == values.shape
    # A value in the middle between two codes may be rounded to either in float32.
    apart = made.codes.flatten() - torch.tensor(codes)
    assert int(apart.abs().max()) <= int((apart != 0).any()) <= 1
    assert int((apart != 0).sum()) <= 1
    steps = torch.tensor(scales).repeat_interleave(BLOCK)[: values.numel()].view(shape)
    assert ((made.dequantised() - values).abs() <= 0.5001 * steps).all()


def test_a_block_of_zeros_has_the_scale_zero_and_stays():
    made = Int8Tensor.like(torch.zeros(200))
    made.codes.fill_(7)
    made.scales.zero_()
    made.copy_(torch.zeros(200))
    assert not made.codes.any()
    assert not made.scales.any()
    made.store_(slice(0, 200), torch.zeros(200), torch.Generator().manual_seed(0))
    assert not made.dequantised().any()


def test_stochastic_rounding_to_codes_is_unbiased_and_within_one_step():
    """The mean of 4,000 draws: a draw's deviation is at most half a step, of the mean 1/126 of a step, for every element."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(2))
    steps = torch.tensor(rewritten(values)[1]).repeat_interleave(BLOCK)[:300]
    noise, total = torch.Generator().manual_seed(3), torch.zeros(300, dtype=torch.float64)
    seen = set()
    for _ in range(4000):
        made = stored(torch.zeros(300))
        made.store_(slice(0, 300), values, noise)
        total += made.dequantised()
        assert ((made.dequantised() - values).abs() < 1.0001 * steps).all()
        seen.add(int(made.codes[5]))
    assert ((total / 4000 - values).abs() <= 5 * steps / 126).all()
    assert len(seen) == 2


@pytest.mark.parametrize("noise", [None, torch.Generator().manual_seed(0)])
def test_a_block_whose_values_do_not_change_stays_bit_identical(noise):
    """Also where no code is 127, so that the values would fit a smaller scale."""
    made = stored(torch.randn(20 * BLOCK + 60, generator=torch.Generator().manual_seed(4)))
    made.codes[: 2 * BLOCK] //= 2
    before = [part.clone() for part in made.stored_parts.values()]
    values = made.working_values(slice(0, made.numel()))
    values[3 * BLOCK + 1] += 0.7 * made.scales[3]
    made.store_(slice(0, made.numel()), values, noise)
    changed = (made.codes != before[0]).view(-1)
    assert torch.equal(made.scales[:3], before[1][:3])
    assert torch.equal(made.scales[4:], before[1][4:])
    assert not changed[: 3 * BLOCK].any()
    assert not changed[4 * BLOCK :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 100, 256])
def test_rows_are_those_of_the_values_and_gradients_plain(columns, dtype):
    weight = nn.Parameter(stored(torch.randn(50, columns, generator=torch.Generator().manual_seed(6)), dtype))
    assert (type(weight), weight.dtype, weight.is_leaf) == (Int8Tensor, dtype, True)
    plain = weight.detach().dequantised().requires_grad_()
    assert type(plain) is torch.Tensor
    ids = torch.tensor([[3, 49, 0], [3, 7, 7]])
    rows, expected = F.embedding(ids, weight), F.embedding(ids, plain)
    assert torch.equal(rows, expected)
    (rows * rows).sum().backward()
    (expected * expected).sum().backward()
    assert type(weight.grad) is torch.Tensor
    assert torch.equal(weight.grad, plain.grad)
    for part in (slice(0, 5), slice(7, 20), slice(-3, None), slice(30, 30), slice(None)):
        assert torch.equal(weight.detach()[part], plain.detach()[part])


@pytest.mark.parametrize("shape", [(50, 100), (700,), (8, 4, 128)])
def test_looking_up_and_slicing_rows_computes_no_other_values(shape, monkeypatch):
    """At 7B all values of the head take 262 MB in bfloat16, a slice of its rows 4 MB."""
    weight = stored(torch.randn(shape, generator=torch.Generator().manual_seed(6)))
    expected = weight.dequantised()[3:40]
    monkeypatch.setattr(Int8Tensor, "_values", None)
    assert torch.equal(weight[3:40], expected)
    assert torch.equal(weight.narrow(0, 3, len(expected)), expected)
    if len(shape) == 2:
        assert torch.equal(F.embedding(torch.tensor([3, 4]), weight), expected[:2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_linear_keeps_codes_and_has_the_gradients_of_its_values(dtype, bias):
    torch.manual_seed(7)
    linear = nn.Linear(40, 30, bias=bias, dtype=dtype)
    linear.weight = nn.Parameter(stored(linear.weight.detach(), dtype))
    plain = copy.deepcopy(linear)
    plain.weight = nn.Parameter(linear.weight.detach().dequantised())
    x = torch.randn(2, 5, 40).to(dtype)
    found = []
    for layer in (linear, plain):
        inputs = x.clone().requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = layer(inputs)
        assert {type(t) is Int8Tensor for t in kept if t.numel() == 30 * 40} == {layer is linear}
        y.square().sum().backward()
        found.append([y, inputs.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        named = F.linear(x, linear.weight, bias=linear.bias)
    assert torch.equal(named, linear(x))


@pytest.mark.parametrize("path", ["materialised", "factored"])
@pytest.mark.parametrize(("support", "scaled"), [("uniform", False), ("block", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_keeps_codes_and_computes_as_with_their_values(dtype, support, scaled, path):
    settings = {"support": support, "trainable_scaling": scaled, "path": path, "seed": 3, "dtype": dtype, "bias": True}
    layer = SparseLowRankLinear(96, 80, 16, 0.1, **settings)
    with torch.no_grad():
        layer.lora_B.normal_()
    quantise_parameters(layer)
    assert {name for name, p in layer.named_parameters() if type(p) is Int8Tensor} == {"lora_A", "lora_B", "sparse_value"}
    plain = SparseLowRankLinear(96, 80, 16, 0.1, **settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            plain.get_parameter(name).copy_(parameter)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(8)).to(dtype)
    found = []
    for each in (layer, plain):
        inputs, kept = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = each(inputs)
        shapes = {p.shape for p in (each.lora_A, each.lora_B, each.sparse_value)}
        assert {type(t) for t in kept if t.shape in shapes} == {type(each.lora_A)}
        y.square().sum().backward()
        gradients = [parameter.grad for parameter in each.parameters()]
        assert all(type(gradient) is torch.Tensor for gradient in gradients)
        with torch.no_grad():
            found.append([y, inputs.grad, *gradients, each.dense_weight(), each(x[:3])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_the_layers_weight_is_differentiable():
    layer = SparseLowRankLinear(20, 10, 4, 0.2, seed=0)
    quantise_parameters(layer)
    layer.dense_weight().square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.lora_B.grad.any()


def test_writing_in_place_stores_new_values_and_other_writes_are_refused():
    made = stored(torch.arange(1.0, 301).view(3, 100))
    made.mul_(0.5)
    torch.testing.assert_close(made.dequantised(), torch.arange(1.0, 301).view(3, 100) / 2, rtol=0, atol=150 / 127)
    other = stored(torch.zeros(3, 100))
    other.copy_(made)
    assert torch.equal(other.codes, made.codes)
    plain = torch.ones(3, 100)
    plain.add_(made)
    assert torch.equal(plain, 1 + made.dequantised())
    with pytest.raises(TypeError, match="cannot write"):
        torch.add(plain, plain, out=made)


def test_collectives_that_would_change_a_copy_are_refused():
    """Their operators do not say that they write, so that a broadcast would leave the stored values as they are."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="plain tensors"):
            distributed.broadcast(stored(torch.ones(3, 100)), 0)
    finally:
        distributed.destroy_process_group()


def test_copies_and_moves_keep_what_is_stored():
    made = nn.Parameter(stored(torch.randn(3, 100), torch.bfloat16))
    for one in (copy.deepcopy(made), made.detach().clone(), made.detach().to("cpu", copy=True)):
        assert type(one) is Int8Tensor
        assert torch.equal(one.codes, made.codes)
        assert one.codes.data_ptr() != made.codes.data_ptr()
    assert made.detach().codes.data_ptr() == made.codes.data_ptr()
    for plain in (made.detach().float(), made.detach() * 2, torch.zeros_like(made), torch.empty_like(made)):
        assert type(plain) is torch.Tensor
        assert plain.shape == made.shape


def test_a_model_is_quantised_without_its_norms_tied_parameters_as_one_and_is_allocated_afterwards():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 8, device="meta"), "lm_head": nn.Linear(8, 10, False, "meta")})
    model["lm_head"].weight = model["embed_tokens"].weight
    model["norm"] = nn.LayerNorm(8, device="meta")
    quantise_parameters(model)
    assert model["lm_head"].weight is model["embed_tokens"].weight
    model.to_empty(device="cpu")
    kinds = {name: type(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert {name for name, kind in kinds.items() if kind is Int8Tensor} == {"embed_tokens.weight", "lm_head.weight"}
    assert model["embed_tokens"].weight.codes.device.type == "cpu"
