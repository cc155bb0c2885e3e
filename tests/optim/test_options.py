"""Options beyond torch's: their ranges, one by one."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from llmfast.optim import FusedAdamW, FusedSGD
from llmfast.optim.formats import PARAM_FORMATS
from llmfast.optim.options import Options

RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_grad_norm": ([None, 1e-9, 1.0, math.inf], [0.0, -1.0, math.nan]),
    "ema_decay": ([None, 0.0, 0.5, 0.9999], [1.0, -1e-9, 1.5, math.nan]),
    "seed": ([0, 1, 2**32, 2**53 - 1], [-1, 2**53]),
    "master_weights": ([None, "fp32", "split16", "split8", "kahan", "stochastic"], ["", "fp16", "split", True]),
    "state_dtype": ([None, torch.float32, torch.bfloat16, torch.float16, "8bit"], [torch.float64, "float32", "", 8]),
    "zero_grads": ([False, True], []),
}


def test_every_option_is_tried_and_off_by_default() -> None:
    assert vars(Options()) == {name: good[0] for name, (good, _) in RANGES.items()}
    assert RANGES.keys() - {"seed", "zero_grads"} == Options.PER_GROUP


@pytest.mark.parametrize("name", RANGES)
def test_an_option_takes_what_it_can_and_names_itself_for_the_rest(name: str) -> None:
    good, bad = RANGES[name]
    for value in good:
        assert getattr(Options.given({name: value}), name) is value  # type: ignore[misc]
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} must be .*; got {value!r}$"):
            Options.given({name: value})  # type: ignore[misc]
        if name in Options.PER_GROUP:
            with pytest.raises(ValueError, match=f"^{name} must be "):
                FusedAdamW([{"params": [torch.zeros(1)], name: value}])
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}s'; those beyond torch's are"):
        Options.given({f"{name}s": good[0]})  # type: ignore[misc]


@pytest.mark.parametrize("key", [*(f"{name}s" for name in RANGES if name != "seed"), "max_gradnorm", "masterweights"])
def test_a_key_that_resembles_an_option_is_a_mistake(key: str) -> None:
    with pytest.raises(ValueError, match=rf"must spell its options correctly: '.*'; got '{key}'"):
        FusedAdamW([{"params": [torch.zeros(1)], key: None}])


@pytest.mark.parametrize("key", ["speed", "seeds", "name", "state", "weights", "grad_norm", 5])
def test_keys_of_the_callers_own_stay_in_the_group(key: Any) -> None:
    optimizer = FusedAdamW([{"params": [torch.zeros(1)], key: "mine"}])
    assert optimizer.param_groups[0][key] == "mine" and optimizer.group_options == [{}]


@pytest.mark.parametrize("name", ["seed", "zero_grads"])
def test_an_option_of_the_whole_is_none_of_a_group(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must hold for all parameter groups: give it to FusedAdamW itself"):
        FusedAdamW([{"params": [torch.zeros(1)], name: 1}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_which_parameters_an_option_fits(dtype: torch.dtype) -> None:
    p = torch.zeros(1, dtype=dtype)
    for name, (good, _) in RANGES.items():
        for value in good[1:]:
            options = Options.given({name: value})  # type: ignore[misc]
            only_real = name in ("master_weights", "state_dtype", "ema_decay")
            refused = (dtype.is_complex and only_real) or (
                dtype == torch.float16 and name == "master_weights" and value in ("split16", "split8", "stochastic")
            )
            if refused:
                with pytest.raises(ValueError, match=r"the parameter|for complex parameters; got the parameter"):
                    options.expect_fits(p, "the parameter")
            else:
                options.expect_fits(p, "the parameter")
    low = dtype in (torch.bfloat16, torch.float16)
    assert Options(master_weights="fp32").master_of(p) == ("fp32" if low else None)


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = FusedAdamW([torch.zeros(1)], ema_decay=0.5)
    before = list(optimizer.param_groups)
    for group in (
        {"params": [torch.zeros(1, dtype=torch.complex64)]},
        {"params": [torch.zeros(1, dtype=torch.float16)], "master_weights": "split16"},
    ):
        with pytest.raises(ValueError, match=r"parameter 0 of group 1|parameters; got"):
            optimizer.add_param_group(group)
        assert optimizer.param_groups == before and optimizer.group_options == [{}]
    another = mock.patch.object(optimizer, "_complete_group", side_effect=TypeError("another error"))
    with another, pytest.raises(TypeError, match="another error"):
        optimizer.add_param_group({"params": [torch.zeros(1)]})
    assert optimizer.param_groups == before and optimizer.group_options == [{}]
    optimizer.add_param_group({"params": [torch.zeros(1)], "ema_decay": None})
    assert len(optimizer.param_groups) == 2 and optimizer.group_options == [{}, {"ema_decay": None}]


@pytest.mark.parametrize("master", [*PARAM_FORMATS])
def test_float32_parameters_need_no_more_bits(path: str, master: Any) -> None:
    found = []
    for options in ({}, {"master_weights": master}):
        wide, low = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
        optimizer = FusedAdamW([wide, low], lr=0.1, **options)
        for p in (wide, low):
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append((wide.detach(), optimizer.state[wide].keys()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("odd", ["is sparse", "is of a differentiable group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_which_options_gradients_that_go_by_torch_may_have(odd: str, dtype: torch.dtype, own: bool) -> None:
    """Take what adds nothing to the parameter and keeps states as torch does; change nothing where one is refused."""
    for name, (good, _) in RANGES.items():
        if own and name not in Options.PER_GROUP:
            continue
        for value in good:
            beside, p = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
            params = [beside, p if odd == "is sparse" else p.clone()]
            second: dict[str, Any] = {"params": params[1:], **({name: value} if own else {})}
            first = {"params": params[:1], "differentiable": False}
            whole: dict[str, Any] = {} if own else {name: value}
            optimizer = FusedSGD([first, second], lr=0.5, differentiable=odd != "is sparse", **whole)
            beside.grad, params[1].grad = torch.ones(2), torch.full((2, 2), 0.5, dtype=dtype)
            if odd == "is sparse":
                params[1].grad = params[1].grad.to_sparse()
            adds = name == "master_weights" and value is not None and dtype == torch.bfloat16
            if adds or (name == "state_dtype" and value is not None):
                message = (
                    rf"^the gradient of parameter 0 of group 1, .* {odd}: master_weights and state_dtype must be None"
                )
                with pytest.raises(ValueError, match=message):
                    optimizer.step()
                assert torch.equal(beside, torch.ones(2)) and len(optimizer.state) == 0
            else:
                optimizer.step()
                assert all(optimizer.state[each]["step"] == 1 for each in params)
                if name == "ema_decay" and value is not None:
                    wanted = 1 + (1 - value) * (params[1].detach().float() - 1)
                    torch.testing.assert_close(optimizer.state[params[1]]["ema_param"], wanted)
                if name == "zero_grads" and value:
                    assert not params[1].grad.to_dense().any()


@pytest.mark.parametrize("name", RANGES)
def test_an_option_of_another_kind_is_refused_by_its_name(name: str) -> None:
    for wrong in ("1", [1], *([True] if name in ("max_grad_norm", "ema_decay", "seed") else [])):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*; got "):
            FusedAdamW([torch.nn.Parameter(torch.ones(3))], **{name: wrong})
